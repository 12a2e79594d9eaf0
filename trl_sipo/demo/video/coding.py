# SPDX-License-Identifier: Apache-2.0
"""Many clips through the autoencoder and the sampler, in batches, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import WanPipeline

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.demo.fashion import IMAGE_SIZE
from trl_sipo.demo.video.model import LATENT_SHAPE
from trl_sipo.demo.video.sprites import NUM_FRAMES

CODING_BATCH = 50


@torch.no_grad()
def decode_many(adapter: BackboneAdapter, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (N, 16, 2, 4, 4) -> clips (N, 3, 5, 32, 32) in [-1, 1]."""
    vae = adapter.pipeline.vae
    parts = adapter.denormalize_latents(latents).split(CODING_BATCH)
    return torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])


@torch.no_grad()
def encode_many(adapter: BackboneAdapter, clips: torch.Tensor) -> torch.Tensor:
    """Clips (N, 3, 5, 32, 32) in [-1, 1] -> normalised latents (N, 16, 2, 4, 4), the posterior's mean."""
    vae = adapter.pipeline.vae
    return adapter.normalize_latents(
        torch.cat([vae.encode(part).latent_dist.mean for part in clips.split(CODING_BATCH)])
    )


@torch.no_grad()
def sample_clips(
    pipeline: WanPipeline,
    prompts: Sequence[str],
    seed: int,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
) -> torch.Tensor:
    """One clip per prompt, through the pipeline's own sampling loop.

    The starting noise of clip i depends on `seed`, `i` and nothing else, so that two models given the same arguments
    start from the same noise whatever the batch size.

    Returns:
        float32 (len(prompts), 3, 5, 32, 32) in [-1, 1].
    """
    noise = torch.randn(len(prompts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
    clips = []
    for start in range(0, len(prompts), batch_size):
        frames = pipeline(
            list(prompts[start : start + batch_size]),
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_frames=NUM_FRAMES,
            latents=noise[start : start + batch_size],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        ).frames
        clips.append(2 * frames.float().transpose(1, 2) - 1)
    return torch.cat(clips)
