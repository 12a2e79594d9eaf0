# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1, Wan 2.2 TI2V-5B and Wan 2.2 A14B."""

from typing import Any

from diffusers import WanPipeline

from tests.adapters.backbone_cases import BackboneCase, sampler_level_of_call
from tests.tiny.wan import tiny_wan, tiny_wan_experts, tiny_wan_ti2v


def load_experts_lora(pipeline: WanPipeline, directory: Any, **options: Any) -> None:
    """As the adapter's class says."""
    pipeline.load_lora_weights(directory, **options)
    second = "pytorch_lora_weights_2.safetensors"
    pipeline.load_lora_weights(directory, weight_name=second, load_into_transformer_2=True, **options)


def _wan(name: str, build: Any, height: int, width: int, **fields: Any) -> BackboneCase:
    return BackboneCase(
        name=name,
        build=build,
        latents_argument="hidden_states",
        call_options={"guidance_scale": 1.0, "height": height, "width": width, "num_frames": 5},
        media_shape=(3, 5, height, width),
        level_of_call=sampler_level_of_call,
        floors_timesteps=True,
        grid_atol=3e-3,  # UniPC's grid, before the shift, ends one training step above 0
        **{"linear_targets": ("to_q", "ffn.net.2"), **fields},
    )


CASES = (
    _wan("wan21", tiny_wan, 16, 32),
    _wan("wan22_5b", tiny_wan_ti2v, 32, 64),
    _wan(
        "wan22_a14b",
        tiny_wan_experts,
        16,
        32,
        denoisers=lambda adapter: [adapter.pipeline.transformer, adapter.pipeline.transformer_2],
        load_lora=load_experts_lora,
    ),
)
