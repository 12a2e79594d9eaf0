# SPDX-License-Identifier: Apache-2.0
"""A tiny Z-Image pipeline with random weights, built in process."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.tiny.qwen import tiny_qwen3, tiny_qwen_tokenizer

TEXT_DIM = 16
LATENT_CHANNELS = 4


def tiny_z_image(
    *, seed: int = 0, scheduler_options: dict[str, Any] | None = None, **transformer_options: Any
) -> ZImagePipeline:
    """A Z-Image pipeline in eval mode: images of multiples of 8, latents of 4 channels and a quarter of the size.

    Weights depend on `seed` alone; the global random state is left as it was.
    """
    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler_options or {})}),
            vae=_vae(),
            text_encoder=tiny_qwen3(tokenizer, TEXT_DIM),
            tokenizer=tokenizer,
            transformer=_transformer(**transformer_options),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer(**options: Any) -> ZImageTransformer2DModel:
    arguments = {
        "in_channels": LATENT_CHANNELS,
        "dim": 16,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_DIM,
        "axes_dims": [4, 2, 2],
        "axes_lens": [1024, 64, 64],
    }
    transformer = ZImageTransformer2DModel(**{**arguments, **options}).eval()
    # Zero as constructed, which would hide what stands in for padding.
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return transformer


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
