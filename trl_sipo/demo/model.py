# SPDX-License-Identifier: Apache-2.0
"""A real Stable Diffusion pipeline of a size that trains on a laptop: same classes as SD 1.5, 32x32 images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trl_sipo.demo.fashion import ASSETS, CLASSES, COLOURS, IMAGE_SIZE
from trl_sipo.errors import BackboneError

PIPELINE_ASSETS = ASSETS / "pipeline"
LATENT_SIZE = 8
MAX_PROMPT_TOKENS = 16
TEXT_WIDTH = 64
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
#: Words that must each be a single token; the tokenizer splits "t-shirt" at its hyphen by itself.
WORDS = ("a", "an", *COLOURS, *(word for name in CLASSES for word in name.replace("-", " ").split()))


def merge_word(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges to a word in order of rank, as the tokenizer does."""
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:], strict=False))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        position = pairs.index(best)
        symbols = [*symbols[:position], "".join(best), *symbols[position + 2 :]]
    return symbols


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges under which each word becomes one token.

    A word is first merged as far as the earlier words' merges take it, and only then gets merges of its own. Those
    rank lower, so that they cannot change what became of an earlier word.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = merge_word([*word[:-1], word[-1] + "</w>"], ranks)
        while len(symbols) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    return list(ranks)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary holds the demo's words, and single characters for everything else."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789-.,'!?"
    merges = word_merges(WORDS)
    entries = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    # CLIP pools the text at the end token, which it finds as the largest id: special tokens come last.
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(entries), START_TOKEN, END_TOKEN])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_PROMPT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 64, untrained."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_PROMPT_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_autoencoder() -> AutoencoderKL:
    """32x32x3 images to 8x8x4 latents and back, untrained."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """The denoiser: convolutions at 8x8, convolutions and cross-attention at 4x4, untrained.

    Attention at 8x8 would double the cost of a step and buys little on latents this small.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_pipeline(seed: int) -> StableDiffusionPipeline:
    """The whole pipeline with untrained weights that depend on `seed` alone; the global random state is left alone."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=build_autoencoder(),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=build_unet(),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline_assets(directory: Path | None = None) -> StableDiffusionPipeline:
    """Load the shipped pipeline (or one that `pretrain` wrote elsewhere) in float32, without a network.

    Raises:
        BackboneError: `directory` holds no pipeline.
    """
    folder = PIPELINE_ASSETS if directory is None else Path(directory)
    if not (folder / "model_index.json").is_file():
        raise BackboneError(f"{folder} holds no pipeline; make one with `python -m trl_sipo.demo.pretrain`.")
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
