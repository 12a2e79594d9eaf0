# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of one text's words, for pipelines that cut a template of known length off their prompts."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer


def tiny_bpe_tokenizer(
    text: str, special_tokens: Sequence[str], chat_template: str | None = None, vocab_size: int = 512
) -> Qwen2Tokenizer:
    """Byte-level BPE trained on `text`: a token or so per word of it, other words in pieces, and any text at all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        additional_special_tokens=list(special_tokens),
        chat_template=chat_template,
        padding_side="right",
    )
