# SPDX-License-Identifier: Apache-2.0
"""A tiny HunyuanVideo-1.5 pipeline with random weights, built in process."""

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer

from tests.tiny.bpe import tiny_bpe_tokenizer
from tests.tiny.qwen import CHAT_TEMPLATE
from tests.tiny.t5 import tiny_t5_encoder

TEXT_DIM = 16
GLYPH_DIM = 8
IMAGE_DIM = 6
LATENT_CHANNELS = 4


def tiny_hunyuan_video15(
    *,
    guidance_scale: float = 1.0,
    seed: int = 0,
    scheduler_options: dict[str, Any] | None = None,
    **transformer_options: Any,
) -> HunyuanVideo15Pipeline:
    """A HunyuanVideo-1.5 pipeline in eval mode: multiples of 4 pixels and 4k + 1 frames, latents of 4x4x4 each.

    Text is padded to fewer tokens than in a loaded pipeline, and there are fewer image tokens. Both are masked, so
    that the predictions of the two differ by rounding only.

    Weights depend on `seed` alone; the global random state is left as it was.
    """
    tokenizer, tokenizer_2 = _tokenizer(), ByT5Tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = HunyuanVideo15Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 5.0, **(scheduler_options or {})}),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5_encoder(tokenizer_2, GLYPH_DIM),
            tokenizer_2=tokenizer_2,
            transformer=_transformer(**transformer_options),
            guider=ClassifierFreeGuidance(guidance_scale=guidance_scale),
        )
    pipeline.vae.enable_slicing()  # this VAE takes one video at a time
    pipeline.tokenizer_max_length = 64
    pipeline.tokenizer_2_max_length = 32
    pipeline.vision_num_semantic_tokens = 3
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer() -> Qwen2Tokenizer:
    """Little more than the 108 tokens for the template that the pipeline cuts off."""
    parameters = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    return tiny_bpe_tokenizer(parameters["system_message"].default, ("<|im_start|>", "<|im_end|>"), CHAT_TEMPLATE)


def _transformer(**options: Any) -> HunyuanVideo15Transformer3DModel:
    arguments = {
        "in_channels": 2 * LATENT_CHANNELS + 1,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,  # the text stream of the last block goes nowhere
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "text_embed_2_dim": GLYPH_DIM,
        "image_embed_dim": IMAGE_DIM,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 32,
        "task_type": "t2v",
    }
    return HunyuanVideo15Transformer3DModel(**{**arguments, **options}).eval()


def _vae() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ).eval()


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLTextModel:
    """Three layers: the pipeline takes the hidden states before the last two."""
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
