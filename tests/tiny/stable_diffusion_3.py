# SPDX-License-Identifier: Apache-2.0
"""Tiny Stable Diffusion 3 and 3.5 pipelines with random weights, built in process."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.tiny.clip import tiny_clip_projector
from tests.tiny.t5 import tiny_t5_encoder, tiny_t5_tokenizer
from tests.tiny_models import tiny_clip_tokenizer

TEXT_DIM = 24


def tiny_stable_diffusion_3(
    *, with_t5: bool = True, seed: int = 0, scheduler_options: dict[str, Any] | None = None, **transformer_options: Any
) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline in eval mode: images 32x32 (latents 4x8x8), two CLIP text encoders and T5.

    Weights depend on `seed` alone; the global random state is left as it was.
    """
    tokenizer, tokenizer_2 = tiny_clip_tokenizer(), tiny_clip_tokenizer()
    tokenizer_2.pad_token = "!"  # as published
    tokenizer_3 = tiny_t5_tokenizer() if with_t5 else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(**transformer_options),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler_options or {})}),
            vae=_vae(),
            text_encoder=tiny_clip_projector(tokenizer, width=8, projection_dim=8),
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip_projector(tokenizer_2, width=12, projection_dim=12),
            tokenizer_2=tokenizer_2,
            text_encoder_3=tiny_t5_encoder(tokenizer_3, width=TEXT_DIM) if with_t5 else None,
            tokenizer_3=tokenizer_3,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_stable_diffusion_3_5(**options: Any) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 Medium in small: a second image attention in its first block, and normalised queries."""
    return tiny_stable_diffusion_3(dual_attention_layers=(0,), qk_norm="rms_norm", **options)


def _transformer(**options: Any) -> SD3Transformer2DModel:
    arguments = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,  # the last block has no text stream
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": 8 + 12,
        "pos_embed_max_size": 6,
    }
    return SD3Transformer2DModel(**{**arguments, **options}).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
