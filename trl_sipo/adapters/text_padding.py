# SPDX-License-Identifier: Apache-2.0
"""Text embeddings with a mask: stored as long as their prompts, given to the denoiser as long as in inference.

A denoiser that masks the padding gives the same prediction whatever stands there, so that zeros take its place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def trim_padding(embeds: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut each prompt's embeddings behind its last token.

    Args:
        embeds: (B, tokens, dim).
        mask: (B, tokens), of any dtype; zero for padding. Padding in front of a prompt, or inside, is kept and masked.

    Returns:
        Per prompt its embeddings (length, dim) and their mask (length,), bool. Both own their memory: a view would
        keep the batch in memory, and in a cache on disk.
    """
    mask = mask.bool()
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths = (mask * positions).amax(dim=1).tolist()
    prompts = zip(embeds, mask, lengths, strict=True)
    return [(row[:length].clone(), kept[:length].clone()) for row, kept, length in prompts]


def pad_rows(rows: Sequence[Tensor], length: int) -> Tensor:
    """Batch rows (at most `length`, ...) into (B, length, ...), with zeros (False in a mask) behind each."""
    batch = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for padded, row in zip(batch, rows, strict=True):
        padded[: len(row)] = row
    return batch
