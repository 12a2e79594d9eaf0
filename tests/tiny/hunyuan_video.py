# SPDX-License-Identifier: Apache-2.0
"""A tiny HunyuanVideo pipeline with random weights, built in process."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import LlamaConfig, LlamaModel, Qwen2Tokenizer

from tests.tiny.bpe import tiny_bpe_tokenizer
from tests.tiny.clip import tiny_clip_encoder
from tests.tiny_models import tiny_clip_tokenizer

TEXT_DIM = 16
LATENT_CHANNELS = 4
_SPECIAL_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def tiny_hunyuan_video(
    *, seed: int = 0, scheduler_options: dict[str, Any] | None = None, **transformer_options: Any
) -> HunyuanVideoPipeline:
    """A HunyuanVideo pipeline in eval mode: multiples of 16 pixels and 4k + 1 frames, latents of 8x8x4 each.

    Weights depend on `seed` alone; the global random state is left as it was.
    """
    # The template has 96 tokens here and 95 in the published tokenizer, which is what the pipeline cuts off.
    tokenizer = tiny_bpe_tokenizer(DEFAULT_PROMPT_TEMPLATE["template"], _SPECIAL_TOKENS)
    tokenizer_2 = tiny_clip_tokenizer(77)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = HunyuanVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 7.0, **(scheduler_options or {})}),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip_encoder(tokenizer_2, width=8),
            tokenizer_2=tokenizer_2,
            transformer=_transformer(**transformer_options),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer(**options: Any) -> HunyuanVideoTransformer3DModel:
    arguments = {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 2, 4),
    }
    return HunyuanVideoTransformer3DModel(**{**arguments, **options}).eval()


def _vae() -> AutoencoderKLHunyuanVideo:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    # With random weights, a rounding of its input comes out a hundred times larger: keep its output small.
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight.mul_(0.25)
    return vae


def _text_encoder(tokenizer: Qwen2Tokenizer) -> LlamaModel:
    """Three layers: the pipeline takes the hidden states before the last two."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
