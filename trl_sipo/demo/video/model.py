# SPDX-License-Identifier: Apache-2.0
"""A real Wan pipeline of a size that trains on a laptop: same classes as Wan 2.1, clips of 5 frames at 32x32."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from trl_sipo.demo.fashion import ASSETS
from trl_sipo.demo.video.sprites import all_video_prompts
from trl_sipo.errors import BackboneError

VIDEO_ASSETS = ASSETS / "video"
TEXT_WIDTH = 48
LATENT_CHANNELS = 16
#: Latents of one clip: channels, frames (one, then four at a time), and 8 pixels a side.
LATENT_SHAPE = (LATENT_CHANNELS, 2, 4, 4)
MAX_PROMPT_TOKENS = 8


def prompt_words() -> list[str]:
    """Every word of every prompt, once."""
    return sorted({word for prompt in all_video_prompts() for word in prompt.text.split()})


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose vocabulary holds the prompts' words, and single characters for everything else."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789-.,'!?"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -10.0)]
    # Of all ways to split a text the most probable one is taken: whole words, where there are some.
    words = [(f"\u2581{word}", -1.0) for word in prompt_words()]
    return T5Tokenizer(vocab=[*special, *words, *((character, -10.0) for character in characters)], extra_ids=0)


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Two layers, untrained."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def build_autoencoder() -> AutoencoderKLWan:
    """5x32x32 clips of 3 channels to 2x4x4 latents of 16 channels and back, untrained.

    Two by two pixels are packed before the first layer, as in the VAE of Wan 2.2: layers at full size would take most
    of the time.
    """
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )


def build_transformer() -> WanTransformer3DModel:
    """The denoiser: four blocks of width 96 over one token per latent pixel, untrained."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=192,
        num_layers=4,
        rope_max_seq_len=32,
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """Sampler and noise process of Wan 2.1 at 480p."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def build_video_pipeline(seed: int) -> WanPipeline:
    """The whole pipeline with untrained weights that depend on `seed` alone; the global random state is left alone."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = WanPipeline(
            vae=build_autoencoder(),
            text_encoder=build_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=build_transformer(),
            scheduler=build_scheduler(),
        )
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_video_pipeline(directory: Path | None = None) -> WanPipeline:
    """Load the shipped pipeline (or one that `pretrain` wrote elsewhere) in float32, without a network.

    Raises:
        BackboneError: `directory` holds no pipeline.
    """
    folder = VIDEO_ASSETS / "pipeline" if directory is None else Path(directory)
    if not (folder / "model_index.json").is_file():
        raise BackboneError(f"{folder} holds no pipeline; make one with `python -m trl_sipo.demo.video.pretrain`.")
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
