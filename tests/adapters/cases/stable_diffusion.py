# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x."""

from typing import Any

from tests.adapters.backbone_cases import BackboneCase
from tests.tiny_models import tiny_stable_diffusion


def _case(prediction_type: str, scheduler: str, **options: Any) -> BackboneCase:
    return BackboneCase(
        name="-".join(["sd", prediction_type, scheduler, *options]),
        build=lambda: tiny_stable_diffusion(prediction_type, scheduler, **options),
        latents_argument="sample",
        call_options={"guidance_scale": 1.0},
    )


CASES = (
    _case("epsilon", "DDIM"),
    _case("v_prediction", "DDIM"),
    _case("epsilon", "PNDM"),
    _case("v_prediction", "EulerDiscrete"),
    _case("epsilon", "EulerDiscrete"),
    _case("v_prediction", "DDIM", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
)
