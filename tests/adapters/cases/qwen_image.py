# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image, with the published shift and with a static one."""

from typing import Any

from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS, BackboneCase, flow_level_of_call, spied_forward
from tests.tiny.qwen_image import tiny_qwen_image
from trl_sipo.adapters.base import BackboneAdapter

HEIGHT, WIDTH = 32, 48
SIZE = {"height": HEIGHT, "width": WIDTH}


def packed(adapter: BackboneAdapter, latents: Tensor) -> Tensor:
    """2x2 patches as tokens."""
    return adapter.pipeline._pack_latents(latents, *latents.shape)


def unpacked(adapter: BackboneAdapter, tokens: Tensor) -> Tensor:
    """Inverse of [`packed`]."""
    return adapter.pipeline._unpack_latents(tokens, HEIGHT, WIDTH, adapter.pipeline.vae_scale_factor).squeeze(2)


def unconditional(pipeline: Any) -> dict:
    """What the transformer is given in the second of a step's two calls, for the negative prompt that users give."""
    with spied_forward(pipeline.transformer) as calls:
        pipeline(PROMPTS, [" ", " "], true_cfg_scale=4.0, num_inference_steps=2, output_type="latent", **SIZE)
    assert len(calls) == 4
    return calls[1]


def reconstruct(pipeline: Any, pixels: Tensor) -> Tensor:
    """The VAE is that of a video model."""
    posterior = pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist
    return pipeline.vae.decode(posterior.mean, return_dict=False)[0][:, :, 0]


def _case(name: str, **scheduler_options: Any) -> BackboneCase:
    return BackboneCase(
        name=name,
        build=lambda: tiny_qwen_image(scheduler_options=scheduler_options),
        latents_argument="hidden_states",
        call_options={"true_cfg_scale": 1.0, **SIZE},
        media_shape=(3, HEIGHT, WIDTH),
        linear_targets=("to_q", "img_mlp.net.2"),
        level_of_call=flow_level_of_call,
        canonical=unpacked,
        native=packed,
        unconditional=unconditional,
        reconstruct=reconstruct,
    )


CASES = (
    _case("qwenimage"),
    _case("qwenimage-static", use_dynamic_shifting=False, shift=3.0, shift_terminal=None),
)
