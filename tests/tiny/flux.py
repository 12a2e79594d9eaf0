# SPDX-License-Identifier: Apache-2.0
"""A tiny FLUX.1 pipeline of the real classes with random weights, built in process."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.tiny.clip import tiny_clip_encoder
from tests.tiny.t5 import tiny_t5_encoder, tiny_t5_tokenizer
from tests.tiny_models import tiny_clip_tokenizer

# The schedulers of FLUX.1-dev and FLUX.1-schnell.
DEV_SHIFT: dict[str, Any] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SCHNELL_SHIFT: dict[str, Any] = {**DEV_SHIFT, "shift": 1.0, "use_dynamic_shifting": False}
LATENT_CHANNELS = 4
TEXT_WIDTH = 16


def tiny_flux(guidance_embeds: bool = True, seed: int = 0, **scheduler_options: Any) -> FluxPipeline:
    """A FLUX.1 pipeline in eval mode: images 16x16 (latents 4x8x8), 512 T5 tokens of 16 dimensions.

    Args:
        guidance_embeds: True for FLUX.1-dev, False for FLUX.1-schnell; the scheduler is the one of either.
        seed: of the weights; the global random state is left as it was.
        scheduler_options: in place of those of dev or schnell.
    """
    tokenizer, tokenizer_2 = tiny_clip_tokenizer(), tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = tiny_clip_encoder(tokenizer, TEXT_WIDTH)
        text_encoder_2 = tiny_t5_encoder(tokenizer_2, TEXT_WIDTH)
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
            sample_size=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        )
    shift = {**(DEV_SHIFT if guidance_embeds else SCHNELL_SHIFT), **scheduler_options}
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    pipeline.default_sample_size = 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
