# SPDX-License-Identifier: Apache-2.0
"""Fast sampling from the demo's pipeline: many prompts at once, reproducible whatever the batch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from trl_sipo.demo.fashion import FashionPrompt


def prompt_ids(prompts: Sequence[FashionPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ids and colour ids, int64 (N,) each."""
    return torch.tensor([p.class_id for p in prompts]), torch.tensor([p.colour_id for p in prompts])


@torch.no_grad()
def sample_images(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seed: int,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    batch_size: int = 256,
) -> torch.Tensor:
    """One image per prompt, through the pipeline's own sampling loop.

    The starting noise of image i depends on `seed`, `i` and nothing else, so that two models given the same arguments
    start from the same noise whatever the batch size.

    Returns:
        float32 (len(prompts), 3, 32, 32) in [-1, 1], on the CPU.
    """
    unet = pipeline.unet
    shape = (len(prompts), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        pixels = pipeline(
            batch,
            latents=noise[start : start + batch_size].to(pipeline.device, unet.dtype),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        ).images
        images.append(2 * pixels.float().cpu() - 1)
    return torch.cat(images)
