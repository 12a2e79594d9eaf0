# SPDX-License-Identifier: Apache-2.0
"""A tiny LTX-Video pipeline with random weights, built in process."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tests.tiny.t5 import tiny_t5_encoder, tiny_t5_tokenizer

TEXT_DIM = 16
LATENT_CHANNELS = 4

# The published shift: it depends on the size, and the last sigma is stretched to 0.1.
_SCHEDULER_OPTIONS: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def tiny_ltx(
    *,
    seed: int = 0,
    scheduler_options: dict[str, Any] | None = None,
    vae_options: dict[str, Any] | None = None,
    **transformer_options: Any,
) -> LTXPipeline:
    """An LTX-Video pipeline in eval mode: multiples of 32 pixels and 8k + 1 frames, as published.

    Weights depend on `seed` alone; the global random state is left as it was.
    """
    tokenizer = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**{**_SCHEDULER_OPTIONS, **(scheduler_options or {})}),
            vae=_vae(**(vae_options or {})),
            text_encoder=tiny_t5_encoder(tokenizer, TEXT_DIM),
            tokenizer=tokenizer,
            transformer=_transformer(**transformer_options),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer(**options: Any) -> LTXVideoTransformer3DModel:
    arguments = {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 1,
        "caption_channels": TEXT_DIM,
    }
    return LTXVideoTransformer3DModel(**{**arguments, **options}).eval()


def _vae(**options: Any) -> AutoencoderKLLTXVideo:
    arguments = {
        "latent_channels": LATENT_CHANNELS,
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("LTXVideoDownBlock3D",) * 3,
        "decoder_block_out_channels": (8, 8, 8),
        "layers_per_block": (1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, True),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (False, False, False, False),
        "downsample_type": ("conv", "conv", "conv"),
        "upsample_residual": (False, False, False),
        "upsample_factor": (1, 1, 1),
    }
    vae = AutoencoderKLLTXVideo(**{**arguments, **options}).eval()
    # 0 and 1 as constructed, which would hide the normalisation.
    vae.latents_mean.copy_(torch.tensor([-0.3, 0.4, 0.1, 0.2]))
    vae.latents_std.copy_(torch.tensor([0.8, 1.4, 1.1, 0.6]))
    return vae
