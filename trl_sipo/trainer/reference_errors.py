# SPDX-License-Identifier: Apache-2.0
"""Errors of the reference by pair and draw: a table that training looks them up in, and the file that it grows in.

A draw takes two floats: a million pairs of eight draws are 64 MB, in memory and on disk.
"""

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trl_sipo.errors import ConfigurationError, DatasetError, StorageError
from trl_sipo.trainer.reference_predictions import PredictionStore

logger = logging.getLogger(__name__)

# Seconds of work that a kill may cost, and the age from which a file under a temporary name is one that a kill left.
SAVE_EVERY = 60.0
_ABANDONED = 3600.0


class ReferenceErrors:
    """Errors of the first draws of some pairs.

    Args:
        ids: (pairs,) int64, ascending: what a dataset calls `pair_index`.
        errors: (pairs, draws, 2) float32, of the chosen and the rejected arm. A pair of which fewer draws are known
            has NaN in the others.
        predictions: Those that the errors were computed from, where they are stored.
    """

    def __init__(self, ids: torch.Tensor, errors: torch.Tensor, predictions: PredictionStore | None = None):
        self.ids = ids
        self.errors = errors
        self.predictions = predictions
        self._num_known = (~errors[..., 0].isnan()).sum(dim=1)

    @classmethod
    def none(cls) -> "ReferenceErrors":
        """No pair."""
        return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, 0, 2))

    @property
    def num_draws(self) -> int:
        """Draws of the pair that has most."""
        return self.errors.shape[1]

    def num_known(self, ids: torch.Tensor) -> torch.Tensor:
        """How many first draws are known of each of the pairs (n,); 0 of pairs that are not there."""
        if not len(self.ids):
            return torch.zeros_like(ids)
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[place] == ids, self._num_known[place], 0)

    def merged(self, other: "ReferenceErrors") -> "ReferenceErrors":
        """The pairs and draws of both; where both have one, it stays as it is here."""
        ids = torch.cat([self.ids, other.ids]).unique()
        errors = torch.full((len(ids), max(self.num_draws, other.num_draws), 2), float("nan"))
        for part in (other, self):
            place, draws = torch.searchsorted(ids, part.ids), slice(0, part.num_draws)
            errors[place, draws] = torch.where(part.errors.isnan(), errors[place, draws], part.errors)
        return ReferenceErrors(ids, errors)

    def first(self, num_draws: int, predictions: PredictionStore | None = None) -> "ReferenceErrors":
        """No more than the first draws of each pair, with their predictions, if they are stored."""
        return ReferenceErrors(self.ids, self.errors[:, :num_draws].contiguous(), predictions)

    def look_up(self, pair_index: torch.Tensor, draw: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
        """Errors (chosen, rejected), (batch,) each, of one draw per pair.

        Raises:
            DatasetError: A pair that is not there, or not with this draw.
        """
        pair_index = pair_index.cpu()
        missing = pair_index[self.num_known(pair_index) <= draw].tolist()
        if missing:
            raise DatasetError(
                f"The pair {missing[0]} was not among those that the reference saw before training. With "
                "`precompute_ref_log_probs=True` the data must give the same pairs each time it is read: shuffle a "
                "stream with a `seed`, leave random changes of its rows out, and set `max_steps` and the batch size "
                "before the trainer is made. Or compute the reference live."
            )
        return self.errors[torch.searchsorted(self.ids, pair_index), draw].unbind(dim=1)


class Bank:
    """The errors of a file, while new ones are added to them.

    Args:
        path: The file; it need not be there.
        key: What the errors depend on, written into the file for people.
        is_written: Whether this process writes the file, and not another one.
        predictions: Where the predictions of the same pairs and draws are kept, if they are. Whoever adds errors has
            written those before.

    Attributes:
        errors: What was read, and what was added up to the last `save`.
        num_added: Pairs of which errors were added.
    """

    def __init__(
        self, path: Path, key: dict[str, Any], *, is_written: bool, predictions: PredictionStore | None = None
    ):
        self.path = path
        self.key = key
        self.is_written = is_written
        self.predictions = predictions
        self.errors = read_errors(path)
        if predictions is not None and is_written and not predictions.is_whole(self.errors.num_draws):
            logger.warning("%s is not whole: the reference is computed anew.", predictions.folder)
            path.unlink(missing_ok=True)  # else what it holds would be merged again
            self.errors = ReferenceErrors.none()
        self.num_added = 0
        self._added: list[ReferenceErrors] = []
        self._added_ids: set[int] = set()
        self._saved_at = time.monotonic()

    def num_missing(self, ids: torch.Tensor, num_draws: int) -> torch.Tensor:
        """How many of the first `num_draws` draws are not known of each of the pairs, (n,)."""
        missing = (num_draws - self.errors.num_known(ids)).clamp(min=0)
        is_added = [pair in self._added_ids for pair in ids.tolist()] if self._added_ids else False
        return missing.masked_fill(torch.tensor(is_added), 0)

    def check_is_writable(self) -> None:
        """Raise [`ConfigurationError`], before long work, when the file that it is for could not be written."""
        if not self.is_written:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise ConfigurationError(
                f"`precompute_ref_log_probs=True` keeps the errors of the reference in {str(self.path.parent)!r}, "
                f"which cannot be written ({error}). Set HF_HOME to a folder that can."
            ) from error

    def add(self, ids: torch.Tensor, errors: torch.Tensor) -> None:
        """Add all missing draws of some pairs, in the form of [`ReferenceErrors`] but in any order.

        The file is written when the last time is long ago; whoever adds calls `save` in the end.
        """
        first = {pair: row for row, pair in reversed(list(enumerate(ids.tolist()))) if pair not in self._added_ids}
        if first:
            rows = torch.tensor([first[pair] for pair in sorted(first)])
            self._added.append(ReferenceErrors(ids[rows], errors[rows]))
            self._added_ids.update(first)
            self.num_added += len(rows)
        if time.monotonic() - self._saved_at >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Bring what was added into `errors` and into the file, with what other runs have written there since."""
        if self._added:
            ids, order = torch.cat([part.ids for part in self._added]).sort()
            self.errors = self.errors.merged(ReferenceErrors(ids, _stacked(self._added)[order]))
            self._added.clear()
            self._added_ids.clear()
            if self.is_written:
                self.errors = self.errors.merged(read_errors(self.path))
                write_errors(self.path, self.errors, self.key)
        self._saved_at = time.monotonic()


def _stacked(parts: list[ReferenceErrors]) -> torch.Tensor:
    """The errors of all parts on top of one another, all with as many draws."""
    num_draws = max(part.num_draws for part in parts)
    missing = [torch.full((len(part.ids), num_draws - part.num_draws, 2), float("nan")) for part in parts]
    return torch.cat([torch.cat([part.errors, rest], dim=1) for part, rest in zip(parts, missing, strict=True)])


def read_errors(path: Path) -> ReferenceErrors:
    """What a file holds: nothing when it is not there, or, with a warning, when it cannot be read."""
    if not path.is_file():
        return ReferenceErrors.none()
    try:
        with safe_open(path, framework="pt") as file:
            errors = file.get_tensor("errors")
            ids = file.get_tensor("ids") if "ids" in file.keys() else torch.arange(len(errors))  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read (%s): the errors of the reference are computed anew.", path, error)
        return ReferenceErrors.none()
    return ReferenceErrors(ids, errors)


def write_errors(path: Path, errors: ReferenceErrors, key: dict[str, Any]) -> None:
    """Whole or not at all: a run killed here leaves the earlier file, and of two runs at a time the last one's stays.

    Pairs that are called 0, 1, 2, ... without a gap, those of a whole dataset, need no `ids`.

    Raises:
        StorageError: The disk is full, or cannot be written.
    """
    try:
        _replace(path, errors, key)
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"The errors of the reference cannot be written into {str(path)!r} ({error}). What was computed in the "
            f"last {SAVE_EVERY:g} seconds or so is lost, and the next run goes on from before: make room, or compute "
            "the reference live."
        ) from error


def _replace(path: Path, errors: ReferenceErrors, key: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for torn in path.parent.glob(f".{path.name}.*"):
        if time.time() - torn.stat().st_mtime > _ABANDONED:
            torn.unlink(missing_ok=True)
    tensors = {"errors": errors.errors.contiguous()}
    if not torch.equal(errors.ids, torch.arange(len(errors.ids))):
        tensors["ids"] = errors.ids
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, name, metadata={"key": json.dumps(key, sort_keys=True)})
        os.chmod(name, path.parent.stat().st_mode & 0o666)  # as any other file there: others may share the folder
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)  # there only if it could not be written
