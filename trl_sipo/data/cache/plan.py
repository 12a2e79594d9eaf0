# SPDX-License-Identifier: Apache-2.0
"""Which file of a cache holds what: decided before anything is encoded, from the rows and the settings alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from trl_sipo.data.cache.attempts import attempt
from trl_sipo.data.cache.buckets import nearest_bucket, picture_size
from trl_sipo.data.cache.manifest import Manifest
from trl_sipo.data.cache.shards import write_whole
from trl_sipo.data.formats import read_prompt, select_pairs
from trl_sipo.data.images import image_size
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.data.video import open_video
from trl_sipo.errors import DatasetError

INDEX, PROMPTS = "index.parquet", "prompts.parquet"
NULL_FILE = Path("text", "null.safetensors")
# The text of a prompt beside its embeddings, as bytes: in this way training reads no table of all prompts.
PROMPT = "utf8"
COLUMNS = ("prompt", "bucket", "shard", "row")

Shape = tuple[int, int, int]

_ROWS_AT_A_TIME = 1000


def latents_file(shard: int) -> Path:
    """Of the latents of some pairs, within a cache."""
    return Path("latents", f"{shard:05d}.safetensors")


def text_file(shard: int) -> Path:
    """Of the embeddings of some prompts, within a cache."""
    return Path("text", f"{shard:05d}.safetensors")


@dataclass(frozen=True)
class Index:
    """Where each pair is. All arrays are (pairs,) integers.

    Args:
        prompt: row of its prompt among the prompts.
        bucket: number of its pair of shapes.
        shard, row: file of its latents, and place in it; row -1: it is broken, and not stored.
        num_prompts: different prompts.
    """

    prompt: np.ndarray
    bucket: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    num_prompts: int

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def is_stored(self) -> np.ndarray:
        """(pairs,) booleans."""
        return self.row >= 0

    def stored(self) -> "Index":
        """Of the pairs that are stored alone."""
        if self.is_stored.all():
            return self
        columns = {name: getattr(self, name)[self.is_stored] for name in COLUMNS}
        return Index(**columns, num_prompts=self.num_prompts)

    def without(self, broken: Sequence[int]) -> "Index":
        """The same pairs, of which these are not stored: in each file, the others have moved together."""
        is_stored = np.ones(len(self), dtype=bool)
        is_stored[list(broken)] = False
        row = np.full(len(self), -1, dtype=np.int32)
        for pairs in self.pairs_by_shard(range(self.num_shards)):
            kept = pairs[is_stored[pairs]]
            row[kept] = np.arange(len(kept))
        return replace(self, row=row)

    @property
    def num_shards(self) -> int:
        return int(self.shard.max()) + 1

    def pairs_by_shard(self, shards: Sequence[int]) -> Iterator[np.ndarray]:
        """The pairs of each shard, broken ones too, in the order of its rows, which is their own."""
        order = np.argsort(self.shard, kind="stable")
        ends = np.searchsorted(self.shard[order], np.arange(self.num_shards + 1))
        for shard in shards:
            yield order[ends[shard] : ends[shard + 1]]

    def files(self, prompts_per_shard: int) -> list[Path]:
        """All files that hold tensors."""
        texts = math.ceil(self.num_prompts / prompts_per_shard)
        return [NULL_FILE, *map(text_file, range(texts)), *map(latents_file, range(self.num_shards))]


def read_index(folder: Path) -> Index:
    """The index of a cache.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        table = pq.read_table(folder / INDEX)
        num_prompts = pq.read_metadata(folder / PROMPTS).num_rows
        columns = {name: table[name].to_numpy() for name in COLUMNS}
        for name, smallest in {"prompt": 0, "bucket": 0, "shard": 0, "row": -1}.items():
            _check_integers(name, columns[name], smallest)
        _check_integers("prompt", num_prompts - 1 - columns["prompt"], 0)
        _check_integers("shard", len(table) - 1 - columns["shard"], 0)  # each has a pair at least
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DatasetError(f"the index of the cache {str(folder)!r} cannot be read: {error}") from error
    return Index(**columns, num_prompts=num_prompts)


def _check_integers(name: str, values: np.ndarray, smallest: int) -> None:
    if values.dtype.kind != "i" or (values < smallest).any():
        raise ValueError(f"its column {name!r} holds what it cannot")


def write_plan(
    folder: Path,
    rows: datasets.Dataset,
    dataset: PreferenceDataset,
    manifest: Manifest,
    pairs_per_shard: Callable[[Shape, Shape], int],
    refuse: Callable[[Exception], None],
    num_workers: int = 0,
) -> None:
    """Decide where everything goes, and write the index and the prompts.

    A pair without a prompt, or whose shape cannot be read, has the first of each: it is found again, and left out,
    when its media are read.

    Args:
        rows: the data.
        dataset: its pairs.
        pairs_per_shard: from the shapes of the two arms (height, width, frames) to the number of pairs in one file.
        refuse: raises an error on a pair, unless the pair may be left out.
    """
    kept = select_pairs(rows, dataset.fmt).kept[: manifest.num_pairs]
    prompt, texts = _unique_prompts(rows, dataset, kept, refuse)
    bucket = np.zeros(len(kept), dtype=np.int32)
    shapes = manifest.shapes
    if len(shapes) > 1:
        bucket = _find_buckets(dataset, manifest, refuse, num_workers)
    shard, row = np.zeros(len(kept), dtype=np.int32), np.zeros(len(kept), dtype=np.int32)
    begun = 0
    for number in np.unique(bucket):
        members = np.flatnonzero(bucket == number)
        chosen, rejected = divmod(int(number), len(shapes))
        capacity = pairs_per_shard(shapes[chosen], shapes[rejected])
        places = np.arange(len(members))
        shard[members], row[members] = begun + places // capacity, places % capacity
        begun += math.ceil(len(members) / capacity)
    _write_table(folder / PROMPTS, {"prompt": pa.array(texts, pa.large_string())})
    write_index(folder, Index(prompt, bucket, shard, row, num_prompts=len(texts)))


def write_index(folder: Path, index: Index) -> None:
    """Write the index, whole or not at all."""
    _write_table(folder / INDEX, {name: pa.array(getattr(index, name), pa.int32()) for name in COLUMNS})


def _write_table(path: Path, columns: dict[str, pa.Array]) -> None:
    write_whole(path, lambda temporary: pq.write_table(pa.table(columns), temporary, compression="zstd"))


def _unique_prompts(
    rows: datasets.Dataset, dataset: PreferenceDataset, kept: np.ndarray, refuse: Callable[[Exception], None]
) -> tuple[np.ndarray, list[str]]:
    """The number of each pair's prompt, and the prompts in the order in which they first come."""
    name = dataset.fmt.prompt
    column = rows.select_columns([name]).with_format(None)
    numbers: dict[str, int] = {}
    prompt = np.zeros(len(kept), dtype=np.int32)
    for start in range(0, len(kept), _ROWS_AT_A_TIME):
        values = column[kept[start : start + _ROWS_AT_A_TIME].tolist()][name]
        for place, value in enumerate(values, start):
            try:
                text = read_prompt(value, where=f"row {dataset.row_number(place)}, column {name!r}")
            except DatasetError as error:
                refuse(error)
            else:
                prompt[place] = numbers.setdefault(text, len(numbers))
    return prompt, list(numbers)


# --------------------------------------------------------------------------------------------------------- buckets


class _Shapes(torch.utils.data.Dataset):
    """The bucket of each pair by the shapes of its media, read from the headers of files; or what is wrong with it."""

    def __init__(self, dataset: PreferenceDataset, manifest: Manifest):
        self.dataset, self.num_pairs = dataset, manifest.num_pairs
        self.shapes = manifest.shapes
        self.sizes = sorted({shape[:2] for shape in self.shapes})
        self.clip = manifest.clip_sampler()

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: int) -> int | Exception:
        where = f"row {self.dataset.row_number(index)}"
        return attempt(lambda: self._bucket(index, where), where)

    def _bucket(self, index: int, where: str) -> int:
        pair = self.dataset.fmt.read(self.dataset.stored_row(index), where=where)
        chosen, rejected = (
            self.shapes.index(self._shape(pair[arm], f"{where}, the {arm} arm")) for arm in ("chosen", "rejected")
        )
        return chosen * len(self.shapes) + rejected

    def _shape(self, value: object, where: str) -> Shape:
        if self.clip is None:
            return (*nearest_bucket(*image_size(value, where=where), self.sizes), 1)
        video = open_video(value, frame_rate=self.clip.rate, where=where)
        length = self.clip.fitting(video).num_frames
        if len(self.sizes) == 1:
            return (*self.sizes[0], length)
        with closing(video.frames()) as frames:
            frame = next(frames, None)
            if frame is None:
                raise DatasetError(f"{where}: the video has no frames")
            return (*nearest_bucket(*picture_size(frame.open()), self.sizes), length)


def _find_buckets(
    dataset: PreferenceDataset, manifest: Manifest, refuse: Callable[[Exception], None], num_workers: int
) -> np.ndarray:
    shapes = DataLoader(
        _Shapes(dataset, manifest), batch_size=_ROWS_AT_A_TIME, num_workers=num_workers, collate_fn=list
    )
    buckets = np.zeros(manifest.num_pairs, dtype=np.int32)
    for pair, found in enumerate(bucket for batch in shapes for bucket in batch):
        if isinstance(found, Exception):
            refuse(found)
        else:
            buckets[pair] = found
    return buckets
