# SPDX-License-Identifier: Apache-2.0
"""Z-Image, with the published static shift and with a dynamic one."""

from typing import Any

import torch
from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS, BackboneCase, sampler_level_of_call, spied_forward
from tests.tiny.z_image import tiny_z_image
from trl_sipo.adapters.base import BackboneAdapter

SIZE = {"height": 32, "width": 40}


def stacked(_adapter: BackboneAdapter, latents: list[Tensor]) -> Tensor:
    """The denoiser takes a list of latents with a dimension for frames."""
    return torch.stack(latents).squeeze(2)


def denoiser_output(_adapter: BackboneAdapter, prediction: Tensor) -> list[Tensor]:
    """The denoiser gives a list, of the negative flow."""
    return list(-prediction.unsqueeze(2))


def unconditional(pipeline: Any) -> dict:
    """What the transformer is given for prompts in the second half of its batch."""
    with spied_forward(pipeline.transformer) as calls:
        pipeline(list(PROMPTS), guidance_scale=5.0, num_inference_steps=1, output_type="latent", **SIZE)
    (call,) = calls
    return {"cap_feats": call["cap_feats"][len(PROMPTS) :]}


def _case(name: str, **scheduler_options: Any) -> BackboneCase:
    return BackboneCase(
        name=name,
        build=lambda: tiny_z_image(scheduler_options=scheduler_options),
        latents_argument="x",
        call_options={"guidance_scale": 0.0, **SIZE},
        media_shape=(3, *SIZE.values()),
        linear_targets=("to_q", "feed_forward.w2"),
        # Not from what the denoiser is given: 1 - sigma has lost sigma's last bits.
        level_of_call=sampler_level_of_call,
        canonical=stacked,
        denoiser_output=denoiser_output,
        unconditional=unconditional,
    )


CASES = (
    _case("zimage"),
    _case("zimage-dynamic", use_dynamic_shifting=True),
)
