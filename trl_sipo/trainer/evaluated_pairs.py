# SPDX-License-Identifier: Apache-2.0
"""Which pairs an evaluation is about: every one of its dataset, and each once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_pair_dropped(args: Any) -> Iterator[None]:
    """Let data loaders that are made in this block keep incomplete batches.

    `dataloader_drop_last` is meant for training, but transformers obeys it in evaluation too: pairs would be missing
    from the metrics, or all of them where they fill no batch of all processes.
    """
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last
