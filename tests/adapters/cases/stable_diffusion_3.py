# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5, without T5, and with a shift that depends on the size."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS, BackboneCase, flow_level_of_call, spied_forward
from tests.tiny.stable_diffusion_3 import tiny_stable_diffusion_3, tiny_stable_diffusion_3_5


def unconditional(pipeline: StableDiffusion3Pipeline) -> dict[str, Any]:
    """What the transformer is given for the first half of a batch with guidance and no negative prompt."""
    with spied_forward(pipeline.transformer) as calls:
        pipeline(PROMPTS[0], num_inference_steps=1, guidance_scale=2.0, output_type="latent")
    return {name: _first_half(value) if isinstance(value, Tensor) else value for name, value in calls[0].items()}


def _first_half(batch: Tensor) -> Tensor:
    return torch.cat([batch[:1]] * len(PROMPTS))


def _case(name: str, build: Callable[..., StableDiffusion3Pipeline], **options: Any) -> BackboneCase:
    return BackboneCase(
        name=name,
        build=lambda: build(**options),
        latents_argument="hidden_states",
        call_options={"guidance_scale": 1.0},
        level_of_call=flow_level_of_call,
        unconditional=unconditional,
        grid_atol=8e-3,  # the sampler's last step, before the shift, is the last of training and not 1 / num_steps
    )


CASES = (
    _case("sd3", tiny_stable_diffusion_3),
    _case("sd35", tiny_stable_diffusion_3_5),
    _case("sd3-without_t5", tiny_stable_diffusion_3, with_t5=False),
    _case("sd3-dynamic_shift", tiny_stable_diffusion_3, scheduler_options={"use_dynamic_shifting": True}),
)
