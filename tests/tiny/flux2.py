# SPDX-License-Identifier: Apache-2.0
"""Tiny FLUX.2 pipelines (dev and klein) of the real classes with random weights, built in process."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny.qwen import tiny_qwen_tokenizer

LATENT_CHANNELS = 2
TEXT_WIDTH = 8
TEXT_LAYERS = 31
"""Both pipelines read three hidden states of the text encoder: 10, 20, 30 (dev) and 9, 18, 27 (klein)."""

# The pipeline of dev gives a message's content as a list of parts, as processors of text and images take it.
_PARTS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def tiny_flux2(seed: int = 0) -> Flux2Pipeline:
    """A FLUX.2-dev pipeline in eval mode: images 16x16 (latents 8x4x4), 512 tokens of 24 dimensions.

    A plain tokenizer takes the place of FLUX.2's `PixtralProcessor`, which needs torchvision and of which the pipeline
    calls `apply_chat_template` alone.
    """
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = _PARTS_TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=MistralConfig(**_text_options(tokenizer), sliding_window=None),
                vision_config=PixtralVisionConfig(
                    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16
                ),
            )
        )
        parts = _tiny_parts(guidance_embeds=True)
    return _finished(Flux2Pipeline(tokenizer=tokenizer, text_encoder=text_encoder.eval(), **parts))


def tiny_flux2_klein(seed: int = 0, is_distilled: bool = False) -> Flux2KleinPipeline:
    """A FLUX.2-klein pipeline in eval mode, of the same sizes as [`tiny_flux2`]; `is_distilled` turns off guidance."""
    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Qwen3ForCausalLM(Qwen3Config(**_text_options(tokenizer)))
        parts = _tiny_parts(guidance_embeds=False)
    return _finished(
        Flux2KleinPipeline(tokenizer=tokenizer, text_encoder=text_encoder.eval(), **parts, is_distilled=is_distilled)
    )


def _text_options(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": TEXT_WIDTH,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }


def _tiny_parts(guidance_embeds: bool) -> dict[str, Any]:
    """What dev and klein have in common: scheduler, VAE and transformer."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=16,
    )
    # A new batch norm has mean 0 and variance 1, with which a wrong normalisation would hardly be seen.
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.3, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=16,
        mlp_ratio=1.0,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    # The pipelines compute mu themselves: the scheduler's base_shift and max_shift are not read.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": vae.eval(), "transformer": transformer.eval(), "scheduler": scheduler}


def _finished(pipeline: Any) -> Any:
    pipeline.default_sample_size = 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
