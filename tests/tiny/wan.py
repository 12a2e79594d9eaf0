# SPDX-License-Identifier: Apache-2.0
"""Tiny Wan pipelines: one transformer (2.1), two experts (2.2 A14B), or a timestep per token (2.2 TI2V-5B)."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny.t5 import tiny_t5_tokenizer

TEXT_WIDTH = 8
CHANNELS = 4
BOUNDARY_RATIO = 0.875


def tiny_wan(seed: int = 0, **options: Any) -> WanPipeline:
    """Wan 2.1: latents of 4 channels, 8 pixels a side and 4 frames each; `options` are the pipeline's."""
    return _wan(seed, tiny_wan_vae, **options)


def tiny_wan_experts(seed: int = 0, **options: Any) -> WanPipeline:
    """Wan 2.2 A14B: `transformer` from timestep 875 up, `transformer_2` below."""
    return _wan(seed, tiny_wan_vae, **{"boundary_ratio": BOUNDARY_RATIO, "with_second_expert": True, **options})


def tiny_wan_ti2v(seed: int = 0, **options: Any) -> WanPipeline:
    """Wan 2.2 TI2V-5B: 16 pixels a side for each latent, and one timestep for each token."""
    return _wan(seed, tiny_wan_residual_vae, expand_timesteps=True, **options)


def tiny_wan_vae() -> AutoencoderKLWan:
    """The VAE of Wan 2.1 and A14B, in eval mode. The caller seeds."""
    return AutoencoderKLWan(**_vae_options()).eval()


def tiny_wan_residual_vae() -> AutoencoderKLWan:
    """The VAE of TI2V-5B, which packs 2 by 2 pixels before its first layer. The caller seeds."""
    packed = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    return AutoencoderKLWan(**_vae_options(), **packed, is_residual=True).eval()


def tiny_wan_transformer(**options: Any) -> WanTransformer3DModel:
    """One block of width 24, in eval mode. The caller seeds."""
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**arguments, **options}).eval()


def wan_scheduler(**options: Any) -> UniPCMultistepScheduler:
    """The published sampler, with the shift of 480p."""
    arguments = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return UniPCMultistepScheduler(**{**arguments, **options})


def _vae_options() -> dict[str, Any]:
    return {
        "base_dim": 4,
        "z_dim": CHANNELS,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [-0.8, -0.1, 0.3, 1.5],
        "latents_std": [2.8, 1.4, 0.6, 1.1],
    }


def _wan(seed: int, build_vae: Any, *, with_second_expert: bool = False, **options: Any) -> WanPipeline:
    tokenizer = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = {
            "vae": build_vae(),
            "text_encoder": _text_encoder(len(tokenizer)),
            "transformer": tiny_wan_transformer(),
            "transformer_2": tiny_wan_transformer() if with_second_expert else None,
            "scheduler": wan_scheduler(),
        }
    pipeline = WanPipeline(tokenizer=tokenizer, **{**components, **options})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=vocab_size, d_model=TEXT_WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()
