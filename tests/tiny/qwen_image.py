# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen-Image pipeline with random weights, built in process."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.tiny.qwen import tiny_qwen2_5_vl, tiny_qwen_tokenizer

TEXT_DIM = 16
LATENT_CHANNELS = 4

# The published shift: it depends on the size, and the last sigma is stretched to 0.02.
_SCHEDULER_OPTIONS: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def tiny_qwen_image(
    *, seed: int = 0, scheduler_options: dict[str, Any] | None = None, **transformer_options: Any
) -> QwenImagePipeline:
    """A Qwen-Image pipeline in eval mode: images of multiples of 16, latents of 4 channels and an eighth of the size.

    Weights depend on `seed` alone; the global random state is left as it was.
    """
    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**{**_SCHEDULER_OPTIONS, **(scheduler_options or {})}),
            vae=_vae(),
            text_encoder=tiny_qwen2_5_vl(tokenizer, TEXT_DIM),
            tokenizer=tokenizer,
            transformer=_transformer(**transformer_options),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer(**options: Any) -> QwenImageTransformer2DModel:
    arguments = {
        "patch_size": 2,
        "in_channels": 4 * LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": 2,  # the text stream of the last block goes nowhere
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "axes_dims_rope": (2, 2, 4),
    }
    return QwenImageTransformer2DModel(**{**arguments, **options}).eval()


def _vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7, 0.4, 1.5, 0.1],
        latents_std=[2.8, 1.4, 1.1, 3.2],
    ).eval()
