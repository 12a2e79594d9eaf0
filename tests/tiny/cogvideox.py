# SPDX-License-Identifier: Apache-2.0
"""Tiny CogVideoX pipelines: 2B (positions in the patches), 5B (rotary) and 1.5-5B (patches of two frames)."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from tests.tiny.t5 import tiny_t5_encoder, tiny_t5_tokenizer

TEXT_WIDTH = 8
CHANNELS = 4


def tiny_cogvideox_2b(seed: int = 0, **options: Any) -> CogVideoXPipeline:
    """CogVideoX-2B: sinusoidal positions; `options` are the pipeline's."""
    return _cogvideox(seed, {}, 1.15258426, 3.0, **options)


def tiny_cogvideox_5b(seed: int = 0, **options: Any) -> CogVideoXPipeline:
    """CogVideoX-5B: rotary positions."""
    return _cogvideox(seed, {"use_rotary_positional_embeddings": True}, 0.7, 1.0, **options)


def tiny_cogvideox_15(seed: int = 0, **options: Any) -> CogVideoXPipeline:
    """CogVideoX-1.5-5B: rotary positions, and patches of two latent frames."""
    transformer_options = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False}
    return _cogvideox(seed, transformer_options, 0.7, 1.0, **options)


def tiny_cogvideox_transformer(**options: Any) -> CogVideoXTransformer3DModel:
    """One block of width 32, for 16 by 32 pixels and 9 frames, in eval mode. The caller seeds."""
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": 1,
        "sample_height": 2,
        "sample_width": 4,
        "sample_frames": 9,
    }
    return CogVideoXTransformer3DModel(**{**arguments, **options}).eval()


def cogvideox_scheduler(snr_shift_scale: float = 3.0, **options: Any) -> CogVideoXDDIMScheduler:
    """The published sampler: zero terminal signal-to-noise ratio, shifted by 3 in 2B and not in the others."""
    arguments = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "snr_shift_scale": snr_shift_scale,
    }
    return CogVideoXDDIMScheduler(**{**arguments, **options})


def _cogvideox(
    seed: int, transformer_options: dict[str, Any], scaling_factor: float, snr_shift_scale: float, **options: Any
) -> CogVideoXPipeline:
    tokenizer = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = {
            "vae": AutoencoderKLCogVideoX(
                block_out_channels=(4, 4, 4, 4),
                latent_channels=CHANNELS,
                layers_per_block=1,
                norm_num_groups=2,
                sample_height=16,
                sample_width=32,
                scaling_factor=scaling_factor,
            ).eval(),
            "text_encoder": tiny_t5_encoder(tokenizer, TEXT_WIDTH),
            "transformer": tiny_cogvideox_transformer(**transformer_options),
            "scheduler": cogvideox_scheduler(snr_shift_scale),
        }
    pipeline = CogVideoXPipeline(tokenizer=tokenizer, **{**components, **options})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
