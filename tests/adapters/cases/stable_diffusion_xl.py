# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL with the published base model's scheduler, and v-prediction fine-tunes."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS, BackboneCase, spied_forward
from tests.tiny.stable_diffusion_xl import tiny_stable_diffusion_xl


def unconditional(pipeline: StableDiffusionXLPipeline) -> dict[str, Any]:
    """What the UNet is given for the first half of a batch with guidance and no negative prompt."""
    with spied_forward(pipeline.unet) as calls:
        pipeline(PROMPTS[0], num_inference_steps=1, guidance_scale=2.0, output_type="latent")
    embeds = _first_half(calls[0]["encoder_hidden_states"])
    added = {name: _first_half(tensor) for name, tensor in calls[0]["added_cond_kwargs"].items()}
    return {**calls[0], "encoder_hidden_states": embeds, "added_cond_kwargs": added}


def _first_half(batch: Tensor) -> Tensor:
    return torch.cat([batch[:1]] * len(PROMPTS))


def _case(prediction_type: str, scheduler: str, **options: Any) -> BackboneCase:
    return BackboneCase(
        name="-".join(["sdxl", prediction_type, scheduler, *options]),
        build=lambda: tiny_stable_diffusion_xl(prediction_type, scheduler, **options),
        latents_argument="sample",
        call_options={"guidance_scale": 1.0},
        unconditional=unconditional,
        not_as_in_bfloat16=("added_cond_kwargs.time_ids",),
    )


CASES = (
    _case("epsilon", "EulerDiscrete"),
    _case("v_prediction", "EulerDiscrete"),
    _case("v_prediction", "DDIM", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
)
