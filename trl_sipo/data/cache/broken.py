# SPDX-License-Identifier: Apache-2.0
"""Pairs that cannot be read: tried again, and then the end of the run, or left out and listed.

    latents/00003.bad_rows.jsonl   the pairs that are not in latents/00003.safetensors, written before it
    bad_rows.jsonl                 all of them, as `skip_rows` takes it; written when all files of latents are there

In the index, the row of such a pair is -1.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trl_sipo.data.cache.attempts import attempt, is_broken
from trl_sipo.data.cache.manifest import Manifest, read_manifest
from trl_sipo.data.cache.plan import Index, latents_file, write_index
from trl_sipo.data.cache.shards import write_whole
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.data.row_selection import row_key
from trl_sipo.errors import DatasetError

BAD_ROWS = "bad_rows.jsonl"

_COUNTED_LAST, _COUNTED_LEAST = 1000, 100


class BrokenPair(NamedTuple):
    """A pair that cannot be read.

    Args:
        pair: its number among the pairs of the index.
        row: its number in the data.
        key: of its row (`row_selection.row_key`).
        reason: what is wrong with it.
    """

    pair: int
    row: int
    key: str
    reason: str


class Attempts(torch.utils.data.Dataset):
    """The pairs of a dataset as tensors, or a [`BrokenPair`], or the error that is not the pair's fault.

    Args:
        dataset: the pairs.
        planned: (pairs, 2, 3) integers, the height, width and number of frames that each arm has a place for.
    """

    def __init__(self, dataset: PreferenceDataset, planned: np.ndarray):
        self.dataset, self.planned = dataset, planned

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | BrokenPair | Exception:
        number = self.dataset.row_number(index)
        found = attempt(lambda: self._read(index), f"row {number}")
        if not is_broken(found):
            return found
        key = row_key(self.dataset.fmt, self.dataset.stored_row(index))
        return BrokenPair(index, number, key, str(found).removeprefix(f"row {number}").lstrip(",: "))

    def _read(self, index: int) -> dict[str, Any]:
        pair = self.dataset[index]
        for arm, planned in zip(("chosen", "rejected"), self.planned[index].tolist(), strict=True):
            shape = tuple(pair[f"{arm}_pixels"].shape)
            if math.prod(shape[1:-2]) != planned[2] or list(shape[-2:]) != planned[:2]:
                raise DatasetError(
                    f"row {self.dataset.row_number(index)}, the {arm} arm: it has the shape {shape}, but its place is "
                    f"of {planned} (height, width, frames): when the cache was begun it could not be read, or was "
                    "another one. A cache in a new folder would have a place for it"
                )
        return pair


class Attempted(NamedTuple):
    """A batch of what was attempted.

    Args:
        batch: of the pairs that were read; None: there are none.
        broken: the others.
        failure: why the run has to end; None: it has not.
    """

    batch: dict[str, Any] | None
    broken: list[BrokenPair]
    failure: Exception | None

    @classmethod
    def of(cls, items: Sequence[Any]) -> "Attempted":
        """As a data loader collates items of [`Attempts`]."""
        pairs = [item for item in items if isinstance(item, dict)]
        batch = DataCollatorForDiffusionPreference()(pairs) if pairs else None
        broken = [item for item in items if isinstance(item, BrokenPair)]
        return cls(batch, broken, next((item for item in items if isinstance(item, Exception)), None))

    @property
    def num_read(self) -> int:
        return 0 if self.batch is None else len(self.batch["pair_numbers"])

    @property
    def num_pairs(self) -> int:
        return self.num_read + len(self.broken)


@dataclass
class Tolerance:
    """Whether broken pairs are left out, and when there are too many of them for all to be the rows' fault.

    Args:
        max_share: of the last thousand pairs, or of the first hundred; None: a broken pair is an error.
    """

    max_share: float | None
    _last: deque = field(default_factory=lambda: deque(maxlen=_COUNTED_LAST))

    def count(self, attempted: Attempted, shard: int) -> None:
        """Raise what a batch gives cause for.

        Raises:
            MediaAccessError: the file system does not let a file be read.
            ConfigurationError: nothing could be read with these settings.
            DatasetError: a pair is broken while none may be, or too many are.
        """
        if attempted.failure is not None:
            raise attempted.failure
        for pair in attempted.broken:
            self.refuse(DatasetError(f"row {pair.row}, {pair.reason}"))
        self._last.extend([None] * attempted.num_read + [shard] * len(attempted.broken))
        num_broken = sum(shard is not None for shard in self._last)
        if attempted.broken:
            self.refuse_too_many(num_broken, len(self._last), f"the last is row {attempted.broken[-1].row}, ")

    def refuse(self, problem: Exception) -> None:
        """Raise what is wrong with a pair, unless such a pair may be left out."""
        if not is_broken(problem):
            raise problem
        if self.max_share is None:
            raise DatasetError(
                f"{str(problem).rstrip('.')}. Mend the row and run the same command again, which keeps what is "
                "encoded, or add `--skip_broken`, which leaves out and lists such pairs."
            )

    def refuse_too_many(self, num_broken: int, num_pairs: int, example: str = "") -> None:
        """Raise a DatasetError when the share of broken pairs, of at least a hundred, is above the largest."""
        if self.max_share is not None and num_pairs >= _COUNTED_LEAST and num_broken > self.max_share * num_pairs:
            raise DatasetError(
                f"{num_broken} of {num_pairs} pairs are broken ({example}as listed in the cache), more than "
                f"`--max_broken {self.max_share:g}` allows. Is the folder of the media there, and the right one? Run "
                "the same command again to go on, with `--max_broken 1` if they are broken indeed."
            )

    @property
    def doubtful_shards(self) -> set[int]:
        """Files of latents that lack one of the pairs counted last."""
        return {shard for shard in self._last if shard is not None}


# ----------------------------------------------------------------------------------------------------------- files


def broken_file(shard: int) -> Path:
    """Of the pairs that a file of latents lacks, within a cache."""
    return latents_file(shard).with_suffix(".bad_rows.jsonl")


def write_broken(folder: Path, shard: int, broken: Sequence[BrokenPair]) -> None:
    """List what a file of latents is going to lack; call it before that file is written."""
    if broken:
        _write_lines(folder / broken_file(shard), [pair._asdict() for pair in sorted(broken)])
    else:
        (folder / broken_file(shard)).unlink(missing_ok=True)


def read_broken(folder: Path) -> list[BrokenPair]:
    """All pairs that the files of a cache lack, in order; of a file that is missing, none is known.

    Raises:
        DatasetError: a list of them cannot be read.
    """
    found = []
    for path in (folder / latents_file(0)).parent.glob(f"[!.]*{broken_file(0).suffixes[0]}.jsonl"):
        if path.with_name(path.name.replace(".bad_rows.jsonl", ".safetensors")).is_file():
            found += _read_list(path)
    return sorted(found)


def _read_list(path: Path) -> list[BrokenPair]:
    """What [`write_broken`] wrote; another may have."""
    try:
        if not path.is_file():  # to open a pipe is to wait for it
            raise ValueError("it is no file")
        pairs = [BrokenPair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(tuple(map(type, pair)) == (int, int, str, str) for pair in pairs):
            raise TypeError("a pair has something else for its number, row, key or reason")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DatasetError(f"{str(path)!r} is no list of bad rows of a cache: {error}") from error
    return pairs


def forget_doubtful(folder: Path, shards: Iterable[int]) -> None:
    """Remove files of latents that lack pairs which may be whole: the next run reads these again."""
    for shard in shards:
        (folder / latents_file(shard)).unlink(missing_ok=True)
        (folder / broken_file(shard)).unlink(missing_ok=True)


def settle_broken(folder: Path, index: Index, tolerance: Tolerance) -> list[BrokenPair]:
    """When all files of latents are there: list what they lack, and take it out of the index.

    It may be interrupted anywhere, and be done again.

    Returns:
        What was left out.

    Raises:
        DatasetError: too much, or all of it, which the next run then reads again.
    """
    broken = read_broken(folder)
    if len(broken) == len(index):
        forget_doubtful(folder, range(index.num_shards))  # they hold nothing, and the next run reads all of it again
        raise DatasetError(f"None of the {len(index)} pairs can be read: row {broken[0].row}, {broken[0].reason}")
    tolerance.refuse_too_many(len(broken), len(index))
    manifest = read_manifest(folder)
    if is_settled(manifest, index, broken):
        return broken
    if broken:
        rows = [{"row": pair.row, "key": pair.key, "reason": pair.reason} for pair in broken]
        _write_lines(folder / BAD_ROWS, rows)
    else:
        (folder / BAD_ROWS).unlink(missing_ok=True)
    write_index(folder, index.without([pair.pair for pair in broken]))
    replace(manifest, num_broken=len(broken)).write(folder)
    return broken


def is_settled(manifest: Manifest, index: Index, broken: Sequence[BrokenPair]) -> bool:
    """Whether the index of a cache knows of what its files lack."""
    known = np.flatnonzero(~index.is_stored)
    return manifest.num_broken == len(known) and known.tolist() == [pair.pair for pair in broken]


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
