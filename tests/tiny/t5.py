# SPDX-License-Identifier: Apache-2.0
"""A tiny T5 text encoder and its tokenizer, built in process."""

import string

from transformers import T5Config, T5EncoderModel, T5Tokenizer


def tiny_t5_tokenizer(max_length: int = 512) -> T5Tokenizer:
    """A character-level T5 tokenizer, special tokens first as in the published one."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((piece, -3.0) for piece in characters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def tiny_t5_encoder(tokenizer: T5Tokenizer, width: int = 16) -> T5EncoderModel:
    """One layer with embeddings of `width`, in eval mode. The caller seeds."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()
