# SPDX-License-Identifier: Apache-2.0
"""CogVideoX-2B, 5B and 1.5-5B."""

from typing import Any

from tests.adapters.backbone_cases import BackboneCase
from tests.tiny.cogvideox import tiny_cogvideox_2b, tiny_cogvideox_5b, tiny_cogvideox_15


def _case(name: str, build: Any, **fields: Any) -> BackboneCase:
    return BackboneCase(
        name=name,
        build=build,
        latents_argument="hidden_states",
        call_options={"guidance_scale": 1.0},
        media_shape=(3, 9, 16, 32),
        canonical=lambda adapter, latents: latents.transpose(1, 2),
        native=lambda adapter, latents: latents.transpose(1, 2),
        **fields,
    )


CASES = (
    _case("cogvideox_2b", tiny_cogvideox_2b),
    _case("cogvideox_5b", tiny_cogvideox_5b),
    _case("cogvideox_15", tiny_cogvideox_15, added_frames=4),
)
