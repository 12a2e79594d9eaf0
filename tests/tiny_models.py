# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of the real classes with random weights, built in process: no network, a forward in milliseconds."""

import string
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16
SD15_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_SAMPLER_OPTIONS: dict[str, dict[str, Any]] = {
    "DDIM": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "PNDM": {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    "EulerDiscrete": {"timestep_spacing": "leading", "steps_offset": 1},
}


def tiny_clip_tokenizer(max_length: int = TOKENS) -> CLIPTokenizer:
    """A character-level CLIP tokenizer: letters, digits and punctuation, special tokens last."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length)


def tiny_scheduler(name: str = "DDIM", **options: Any) -> Any:
    """A diffusers scheduler (`DDIM`, `PNDM`, `EulerDiscrete`, ...) with Stable Diffusion 1.5's betas."""
    arguments = {**SD15_BETAS, **_SAMPLER_OPTIONS.get(name, {}), **options}
    return getattr(diffusers, f"{name}Scheduler")(**arguments)


def tiny_stable_diffusion(
    prediction_type: str = "epsilon", scheduler: str = "DDIM", seed: int = 0, **scheduler_options: Any
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline in eval mode: images 32x32 (latents 4x8x8), 16 tokens of 16 dimensions.

    Weights depend on `seed` alone; the global random state is left as it was.
    """
    tokenizer = tiny_clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=tiny_scheduler(scheduler, prediction_type=prediction_type, **scheduler_options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
