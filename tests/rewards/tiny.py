# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the classes that rewards use, with random weights, and pictures to score."""

import string

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel, CLIPTokenizer

from tests.tiny.clip import tiny_clip_config
from tests.tiny_models import tiny_clip_tokenizer

SIDE = 16
PROMPTS = ["a red sneaker", "two blue bags", "a cat &amp; a dog"]


def clip_config(tokenizer: CLIPTokenizer, hidden_act: str = "quick_gelu") -> CLIPConfig:
    """Two layers each, images of 16 pixels in 4 patches, 24 and 16 wide, embeddings of 12."""
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
        "projection_dim": 12,
        "hidden_act": hidden_act,
    }
    text = {**tiny_clip_config(tokenizer, projection_dim=12).to_dict(), "hidden_act": hidden_act}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


def clip(seed: int = 0, max_length: int = 16) -> tuple[CLIPModel, CLIPTokenizer]:
    """A CLIP model in eval mode, with embeddings that depend on all of their input, and its tokenizer."""
    tokenizer = tiny_clip_tokenizer(max_length)
    return randomised(CLIPModel(clip_config(tokenizer)), seed).eval(), tokenizer


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """All weights drawn anew, wide enough that no part of the network is close to doing nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def blip_configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Vision 24 wide in two layers of three heads, text 16 wide in two layers of two."""
    vision = BlipVisionConfig(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=120,
        hidden_size=16,
        encoder_hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        bos_token_id=2,
        sep_token_id=3,
    )
    return vision, text


def bert_tokenizer() -> BertTokenizer:
    """BERT's, of single characters."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *(f"##{one}" for one in string.ascii_lowercase),
    ]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})


def pictures(count: int = 3, size: tuple[int, int] = (40, 28)) -> list[Image.Image]:
    """Noise, another for each."""
    generator = np.random.default_rng(7)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]
