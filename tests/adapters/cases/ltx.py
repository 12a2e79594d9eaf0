# SPDX-License-Identifier: Apache-2.0
"""LTX-Video, with the published shift and a static one, and with a VAE that takes a timestep."""

from typing import Any

from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS, BackboneCase, sampler_level_of_call, spied_forward
from tests.tiny.ltx import tiny_ltx
from trl_sipo.adapters.base import BackboneAdapter

SIZE = {"height": 32, "width": 64, "num_frames": 9}


def packed(adapter: BackboneAdapter, latents: Tensor) -> Tensor:
    """One token per latent."""
    return adapter.pipeline._pack_latents(latents)


def unpacked(adapter: BackboneAdapter, tokens: Tensor) -> Tensor:
    """Inverse of [`packed`]."""
    return adapter.pipeline._unpack_latents(tokens, *adapter.latent_shape(**SIZE)[1:])


def unconditional(pipeline: Any) -> dict:
    """The first half of the batch that the transformer is given with guidance."""
    with spied_forward(pipeline.transformer) as calls:
        pipeline(PROMPTS, guidance_scale=3.0, num_inference_steps=2, output_type="latent", **SIZE)
    return {name: value[: len(PROMPTS)] if isinstance(value, Tensor) else value for name, value in calls[0].items()}


def reconstruct(pipeline: Any, pixels: Tensor) -> Tensor:
    """A VAE that takes a timestep is given 0, the default of the pipeline's call."""
    latents = pipeline.vae.encode(pixels).latent_dist.mean
    timestep = latents.new_zeros(len(latents)) if pipeline.vae.config.timestep_conditioning else None
    return pipeline.vae.decode(latents, timestep).sample


def _case(name: str, **options: Any) -> BackboneCase:
    return BackboneCase(
        name=name,
        build=lambda: tiny_ltx(**options),
        latents_argument="hidden_states",
        call_options={"guidance_scale": 1.0, **SIZE},
        media_shape=(3, 9, 32, 64),
        level_of_call=sampler_level_of_call,
        canonical=unpacked,
        native=packed,
        masks={"encoder_hidden_states": "encoder_attention_mask"},
        unconditional=unconditional,
        reconstruct=reconstruct,
    )


CASES = (
    _case("ltx"),
    _case("ltx-static", scheduler_options={"use_dynamic_shifting": False, "shift": 2.0, "shift_terminal": None}),
    _case("ltx091", vae_options={"timestep_conditioning": True}),
)
