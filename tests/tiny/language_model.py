# SPDX-License-Identifier: Apache-2.0
"""A causal language model with random weights, and a tokenizer for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Tokenizer

from tests.tiny.bpe import tiny_bpe_tokenizer

END = "<|endoftext|>"
WORDS = "the cat sat on a red mat and a small dog ran to it in the rain"


def tiny_tokenizer() -> Qwen2Tokenizer:
    """A token per word of `WORDS`, its space before it; any other text in pieces."""
    return tiny_bpe_tokenizer(WORDS, [END], vocab_size=320)


def tiny_language_model(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 16 over the vocabulary of [`tiny_tokenizer`]."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # far from uniform, so that completions differ in their likelihood
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)
