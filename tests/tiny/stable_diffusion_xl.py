# SPDX-License-Identifier: Apache-2.0
"""A tiny Stable Diffusion XL pipeline with random weights, built in process."""

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

from tests.tiny.clip import tiny_clip_encoder, tiny_clip_projector
from tests.tiny_models import tiny_clip_tokenizer, tiny_scheduler

POOLED_DIM = 12


def tiny_stable_diffusion_xl(
    prediction_type: str = "epsilon",
    scheduler: str = "EulerDiscrete",
    *,
    force_zeros_for_empty_prompt: bool = True,
    seed: int = 0,
    unet_options: dict[str, Any] | None = None,
    vae_options: dict[str, Any] | None = None,
    **scheduler_options: Any,
) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline in eval mode: images 32x32 (latents 4x8x8), two CLIP text encoders.

    Weights depend on `seed` alone; the global random state is left as it was.
    """
    tokenizer, tokenizer_2 = tiny_clip_tokenizer(), tiny_clip_tokenizer()
    tokenizer_2.pad_token = "!"  # as published
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(**(vae_options or {})),
            text_encoder=tiny_clip_encoder(tokenizer, width=8),
            text_encoder_2=tiny_clip_projector(tokenizer_2, width=16, projection_dim=POOLED_DIM),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_unet(**(unet_options or {})),
            scheduler=tiny_scheduler(scheduler, prediction_type=prediction_type, **scheduler_options),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unet(**options: Any) -> UNet2DConditionModel:
    arguments = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 8 + 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + POOLED_DIM,
    }
    return UNet2DConditionModel(**{**arguments, **options}).eval()


def _vae(**options: Any) -> AutoencoderKL:
    arguments = {
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }
    return AutoencoderKL(**{**arguments, **options}).eval()
