# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: dev, which embeds a guidance scale and shifts by the image's size, and schnell, which does neither."""

from functools import partial

from torch import Tensor

from tests.adapters.backbone_cases import BackboneCase, flow_level_of_call
from tests.tiny.flux import tiny_flux
from trl_sipo.adapters.base import BackboneAdapter

HEIGHT, WIDTH = 16, 24


def packed(adapter: BackboneAdapter, latents: Tensor) -> Tensor:
    """2x2 patches as tokens, the layout of the pipeline and of the transformer."""
    return adapter.pipeline._pack_latents(latents, *latents.shape)


def unpacked(adapter: BackboneAdapter, tokens: Tensor) -> Tensor:
    """Inverse of [`packed`]."""
    return adapter.pipeline._unpack_latents(tokens, HEIGHT, WIDTH, adapter.pipeline.vae_scale_factor)


def _case(name: str, guidance_embeds: bool) -> BackboneCase:
    return BackboneCase(
        name=name,
        build=partial(tiny_flux, guidance_embeds),
        latents_argument="hidden_states",
        call_options={"height": HEIGHT, "width": WIDTH},
        media_shape=(3, HEIGHT, WIDTH),
        linear_targets=("to_q", "ff.net.2"),
        level_of_call=flow_level_of_call,
        canonical=unpacked,
        native=packed,
    )


CASES = (_case("flux-dev", guidance_embeds=True), _case("flux-schnell", guidance_embeds=False))
