# SPDX-License-Identifier: Apache-2.0
"""FLUX.2: dev, which embeds a guidance scale, and klein, which is guided by the empty prompt."""

from typing import Any

from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS, BackboneCase, flow_level_of_call, spied_forward
from tests.tiny.flux2 import tiny_flux2, tiny_flux2_klein
from trl_sipo.adapters.base import BackboneAdapter

HEIGHT, WIDTH = 16, 24
SIZE = {"height": HEIGHT, "width": WIDTH}


def packed(adapter: BackboneAdapter, latents: Tensor) -> Tensor:
    """One token per position, the layout of the transformer and of the step callback."""
    return adapter.pipeline._pack_latents(latents)


def unpacked(adapter: BackboneAdapter, tokens: Tensor) -> Tensor:
    """Inverse of [`packed`]."""
    multiple = adapter.spatial_multiple
    return tokens.transpose(1, 2).unflatten(2, (HEIGHT // multiple, WIDTH // multiple))


def decoded_by_pipeline(adapter: BackboneAdapter, latents: Tensor) -> Tensor:
    """The pipeline's images of these latents, put into its last step."""

    def inject(_pipeline: Any, step: int, _timestep: Tensor, tensors: dict) -> dict:
        return {"latents": packed(adapter, latents)} if step == 1 else tensors

    options = {"num_inference_steps": 2, "output_type": "pt", "callback_on_step_end": inject, **SIZE}
    return adapter.pipeline(prompt=PROMPTS, **options).images


def unconditional_of_klein(pipeline: Any) -> dict:
    """What the transformer is given, with guidance on, in the second of a step's two calls."""
    with spied_forward(pipeline.transformer) as calls:
        pipeline(prompt=PROMPTS, num_inference_steps=1, guidance_scale=4.0, output_type="latent", **SIZE)
    assert len(calls) == 2
    return calls[1]


def _case(name: str, **options: Any) -> BackboneCase:
    return BackboneCase(
        name=name,
        latents_argument="hidden_states",
        media_shape=(3, HEIGHT, WIDTH),
        linear_targets=("to_q", "ff.linear_out"),
        level_of_call=flow_level_of_call,
        canonical=unpacked,
        # `pipeline(latents=...)` takes the adapter's own layout; only the transformer and the callback see tokens.
        denoiser_output=packed,
        decoded_by_pipeline=decoded_by_pipeline,
        **options,
    )


CASES = (
    _case("flux2", build=tiny_flux2, call_options=SIZE),
    _case(
        "flux2_klein",
        build=tiny_flux2_klein,
        call_options={**SIZE, "guidance_scale": 1.0},
        unconditional=unconditional_of_klein,
    ),
)
