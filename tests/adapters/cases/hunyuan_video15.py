# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-1.5, whose pipeline has neither step callbacks nor LoRA methods."""

from typing import Any

import torch
from torch import Tensor

from tests.adapters.backbone_cases import BackboneCase, sampler_level_of_call, spied_forward
from tests.tiny.hunyuan_video15 import tiny_hunyuan_video15
from trl_sipo.adapters.base import BackboneAdapter


class HunyuanVideo15Case(BackboneCase):
    """Its VAE decodes one video at a time, unless it is told to slice its batches."""

    def generate(self, pipeline: Any, steps: int = 2, **options: Any) -> Any:
        """As the base class, and for a pipeline that was saved and loaded too."""
        pipeline.vae.enable_slicing()
        return super().generate(pipeline, steps, **options)


def unconditional(pipeline: Any) -> dict:
    """What the transformer is given in the second of a step's two calls, with the default negative prompt."""
    pipeline.guider = pipeline.guider.new(guidance_scale=4.0)
    with spied_forward(pipeline.transformer) as calls:
        CASE.generate(pipeline, steps=1, output_type="latent")
    assert len(calls) == 2
    return calls[1]


def decoded_by_pipeline(adapter: BackboneAdapter, latents: Tensor) -> Tensor:
    """Inference from zeros, in which every step goes straight to `latents`: they are what is decoded."""
    with spied_forward(adapter.denoiser, lambda _call: -latents):
        return CASE.generate(adapter.pipeline, latents=torch.zeros_like(latents), output_type="pt")


def reconstruct(pipeline: Any, pixels: Tensor) -> Tensor:
    """One video at a time."""
    latents = [pipeline.vae.encode(video).latent_dist.mean for video in pixels.split(1)]
    return torch.cat([pipeline.vae.decode(video).sample for video in latents])


def load_lora(pipeline: Any, directory: Any, **options: Any) -> None:
    """Into the transformer."""
    pipeline.transformer.load_lora_adapter(directory, use_safetensors=True, **options)


CASE = HunyuanVideo15Case(
    name="hunyuanvideo15",
    build=tiny_hunyuan_video15,
    latents_argument="hidden_states",
    call_options={"height": 16, "width": 24, "num_frames": 5},
    media_shape=(3, 5, 16, 24),
    level_of_call=sampler_level_of_call,
    canonical=lambda adapter, channels: channels[:, : adapter.pipeline.num_channels_latents],
    masks={
        "encoder_hidden_states": "encoder_attention_mask",
        "encoder_hidden_states_2": "encoder_attention_mask_2",
    },
    unconditional=unconditional,
    reconstruct=reconstruct,
    decoded_by_pipeline=decoded_by_pipeline,
    load_lora=load_lora,
)
CASES = (CASE,)
