# SPDX-License-Identifier: Apache-2.0
"""The pairs of a cache as a dataset of tensors."""

import copy
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_sipo.data.cache.broken import BAD_ROWS, is_settled, read_broken
from trl_sipo.data.cache.manifest import NUMBERS, Manifest, file_samples, is_cache, read_manifest
from trl_sipo.data.cache.plan import NULL_FILE, PROMPT, latents_file, read_index, text_file
from trl_sipo.data.cache.shards import OpenFiles, TensorFile
from trl_sipo.data.formats import Arms
from trl_sipo.errors import DatasetError

logger = logging.getLogger(__name__)


class CachedPairs(torch.utils.data.Dataset):
    """Pairs that `trl-sipo encode` has encoded. Nothing is read but what is asked for, nor kept.

    Item `i`, the `i`-th pair of the data that was encoded, not counting those that were left out as broken, is
    `{"prompt": str, "chosen_latents", "rejected_latents": float32, "conditioning": dict of tensors, "pair_index": i}`;
    with a stored posterior there are `"chosen_std"` and `"rejected_std"`, of clips `"frame_rate"`, and with soft
    labels `"label"`, a float. Of samples of one arm (`with_arms`), the arm is the chosen one.

    Args:
        folder: that `trl-sipo encode` wrote.

    Raises:
        DatasetError: it is no cache, or not a complete one.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        planned = read_index(self.folder)
        if len(planned) != self.manifest.num_pairs:
            raise DatasetError(f"the index of the cache {str(folder)!r} is not the one of its manifest")
        wanted = planned.files(self.manifest.prompts_per_shard)
        missing = [file for file in wanted if not (self.folder / file).is_file()]
        if missing:
            raise DatasetError(
                f"the cache {str(folder)!r} is not complete: {len(missing)} of {len(wanted)} files are missing, such "
                f"as {missing[0]}. Run the same `trl-sipo encode` again, which writes what is missing."
            )
        if not is_settled(self.manifest, planned, read_broken(self.folder)):
            raise DatasetError(
                f"the cache {str(folder)!r} is not complete: its index does not know yet which pairs were left out. "
                "Run the same `trl-sipo encode` again, which writes what is missing."
            )
        self.index = planned.stored()
        self._broken = np.flatnonzero(~planned.is_stored)
        if self.num_broken:
            logger.warning(
                "The cache %s is without %d pairs that could not be read, as listed in %s.",
                folder,
                self.num_broken,
                self.folder / BAD_ROWS,
            )
        self._files = OpenFiles()
        buckets, firsts = np.unique(self.index.bucket, return_index=True)
        self._first_shards = dict(zip(buckets.tolist(), self.index.shard[firsts].tolist(), strict=True))
        self._checked: set[tuple[int, int]] = set()  # bucket and shard
        null = self._files[self.folder / NULL_FILE]
        self._null_layout = {name: (null.dtype(name), null.shape(name)) for name in null.names}
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.arms: Arms = "pair"

    def with_arms(self, arms: Arms) -> "CachedPairs":
        """The same cache, with samples made of other arms."""
        pairs = copy.copy(self)
        pairs.arms = arms
        return self if arms == self.arms else pairs

    def __len__(self) -> int:
        return len(self.index) * (2 if self.arms == "each" else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        if self.arms == "pair":
            return self._pair(index)
        number, is_rejected = divmod(index, 2) if self.arms == "each" else (index, 0)
        sample = one_arm(self._pair(number), "rejected" if is_rejected else "chosen")
        label = {"label": 1.0 - is_rejected} if self.arms == "each" else {}
        return {**sample, **label, "pair_index": index}

    def _pair(self, index: int) -> dict[str, Any]:
        file = self._latents_of(index)
        place = int(self.index.row[index])
        stored = {name: file.row(name, place) for name in file.names}
        _check_finite(stored, file, place)
        text, row = self._text_of(int(self.index.prompt[index]))
        item: dict[str, Any] = {"prompt": _prompt_of(text, row)}
        for arm in ("chosen", "rejected"):
            item[f"{arm}_latents"] = stored.pop(arm).float()
        for name, value in stored.items():
            item[name] = value.float() if value.ndim else float(value)
        conditioning = {name: text.ragged_row(name, row) for name in self._null_layout}
        _check_embeddings(conditioning, self._null_layout, text, row)
        _check_finite(conditioning, text, row)
        return {**item, "conditioning": conditioning, "pair_index": index}

    def _latents_of(self, index: int) -> TensorFile:
        """The file that holds a pair's latents: as the manifest says, and like the first one of the same shapes."""
        bucket, shard = int(self.index.bucket[index]), int(self.index.shard[index])
        file = self._files[self.folder / latents_file(shard)]
        if (bucket, shard) not in self._checked:
            _check_latents(file, self._files[self.folder / latents_file(self._first_shards[bucket])], self.manifest)
            self._checked.add((bucket, shard))
        return file

    def _text_of(self, prompt: int) -> tuple[TensorFile, int]:
        """The file that holds a prompt, and its place there."""
        shard, row = divmod(prompt, self.manifest.prompts_per_shard)
        return self._files[self.folder / text_file(shard)], row

    def null_conditioning(self) -> dict[str, torch.Tensor]:
        """What an unconditional sample is given in place of a prompt."""
        file = self._files[self.folder / NULL_FILE]
        return {name: file.tensor(name) for name in self._null_layout}

    def latent_shapes(self) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Of the chosen and the rejected arm, without the batch dimension, in all batches there can be."""
        files = [self._files[self.folder / latents_file(shard)] for shard in self._first_shards.values()]
        return {(file.shape("chosen")[1:], file.shape("rejected")[1:]) for file in files}

    @property
    def num_buckets(self) -> int:
        """Different pairs of shapes."""
        return len(np.unique(self.index.bucket))

    @property
    def num_broken(self) -> int:
        """Pairs that were left out since they could not be read."""
        return len(self._broken)

    @property
    def dtype(self) -> torch.dtype:
        """In which the latents are stored."""
        return getattr(torch, self.manifest.dtype)

    @property
    def fingerprint(self) -> str:
        """Of what was encoded, how, and to what: equal for equal pairs in equal order."""
        digest = hashlib.blake2b(repr((self.manifest.fingerprint, self._broken.tolist())).encode(), digest_size=16)
        # The manifest knows media by their sizes and names alone, and other media may have those as well.
        for shard in np.unique(self.index.shard).tolist():
            for sample in file_samples(self.folder / latents_file(shard)):
                digest.update(sample)
        return digest.hexdigest()

    @property
    def epoch(self) -> torch.Tensor:
        """One integer, shared with whoever orders the pairs."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch, where it depends on buckets."""
        self._epoch[0] = epoch


def _check_latents(file: TensorFile, first: TensorFile, manifest: Manifest) -> None:
    """Raise DatasetError unless rows of a file make a batch with those of the first one, as the manifest has them."""
    posterior = ("chosen_std", "rejected_std") if manifest.posterior_std else ()
    for name in ("chosen", "rejected", *posterior):
        if file.dtype(name) != getattr(torch, manifest.dtype):
            raise file.damaged(f"its {name!r} is of {file.dtype(name)}, and the manifest says {manifest.dtype}")
    for name in file.names:
        if name not in ("chosen", "rejected", *posterior, *NUMBERS):
            raise file.damaged(f"it has {name!r:.80}, as no such cache has")
        if name in NUMBERS and len(file.shape(name)) != 1:
            raise file.damaged(f"its {name!r} has the shape {file.shape(name)}, and not one number for each pair")
    rows, others = (
        {name: (part.shape(name)[1:], part.dtype(name)) for name in sorted(part.names)} for part in (file, first)
    )
    if rows != others:
        raise file.damaged(f"its rows are {rows}, unlike those of {first.path.name}, {others}")


def _check_embeddings(
    rows: dict[str, torch.Tensor],
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    file: TensorFile,
    row: int,
) -> None:
    """Raise DatasetError unless a prompt's tensors are like those of the empty prompt, but for their lengths."""
    for name, (dtype, shape) in layout.items():
        found = tuple(rows[name].shape)
        if rows[name].dtype != dtype or len(found) != len(shape) or found[1:] != shape[1:]:
            raise file.damaged(
                f"row {row} of its {name!r} has another shape or dtype than that of the empty prompt: {found} of "
                f"{rows[name].dtype}, and {shape} of {dtype}"
            )


def one_arm(pair: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """An arm of a pair as a sample of its own, whose names are those of a chosen arm."""
    other = "chosen" if arm == "rejected" else "rejected"
    kept = {name: value for name, value in pair.items() if not name.startswith(f"{other}_") and name != "label"}
    return {name.replace(f"{arm}_", "chosen_", 1): value for name, value in kept.items()}


def _check_finite(tensors: dict[str, torch.Tensor], file: TensorFile, row: int) -> None:
    """What `trl-sipo encode` wrote was finite: numbers that are not were written by something else, or damaged."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise file.damaged(f"row {row} of its {name!r} holds numbers that are not finite")


def _prompt_of(file: TensorFile, row: int) -> str:
    letters = file.ragged_row(PROMPT, row)
    try:
        return letters.numpy().tobytes().decode("utf-8")
    except (TypeError, UnicodeDecodeError) as error:
        raise file.damaged(f"row {row} of its prompts is no text: {error}") from error


def find_cache(path: Path, split: str) -> Path | None:
    """The cache of a split: the folder itself, or one of the split's name in it; None: neither is a cache.

    Raises:
        DatasetError: the folder is the cache of another split.
    """
    if is_cache(path):
        found = read_manifest(path).split
        if split not in (found, found.split("[")[0]):
            raise DatasetError(
                f"{str(path)!r} is a cache of the split {found!r}, not {split!r}. Encode each split into a folder of "
                f"its name (`--output {path}/<split>`) and give the folder above; of a cache there are no slices."
            )
        return path
    return path / split if is_cache(path / split) else None
