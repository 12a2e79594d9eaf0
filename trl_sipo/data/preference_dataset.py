# SPDX-License-Identifier: Apache-2.0
"""Pairs as tensors, decoded in the data loader's workers, with randomness that depends only on which pair it is."""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from trl_sipo.data.formats import Arms, PreferenceFormat, detect_format, select_pairs, undecoded
from trl_sipo.data.images import open_image
from trl_sipo.data.seeding import seeded_generator
from trl_sipo.data.stored import file_states, stored_value
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.video import ClipSampler, open_arms_clips
from trl_sipo.errors import ConfigurationError, DatasetError

_MAX_WORKERS = 1024


class PreferenceDataset(torch.utils.data.Dataset):
    """The samples of a `datasets.Dataset`, mostly pairs; ties and unlabelled rows are left out.

    Item `i` is `{"prompt": str, "chosen_pixels", "rejected_pixels": float32 (3, height, width) in [-1, 1],
    "pair_index": i}`. Of videos, the pixels are (3, frames, height, width), and there is `"frame_rate"`, a float. Of
    latents, there are `"chosen_latents"`, `"rejected_latents"` instead: float32 of the stored shape. With soft labels
    (`PreferenceFormat.with_soft_labels`), there is `"label"`, a float. A sample of one arm
    (`PreferenceFormat.with_arms`) has the chosen one alone, and where each arm is a sample, `"label"` is 1.0 or 0.0.

    Images and videos are decoded in `__getitem__`, so in the workers of a data loader. The start of the clip, the crop
    and the flip come from a generator seeded by (seed, epoch, pair index): workers, batch size, order and number of
    processes change nothing.

    Args:
        dataset: the rows; its format ("torch", "numpy", ...) is ignored, a `set_transform` is refused.
        fmt: its format; None: from its columns.
        transform: required for images and videos, unused for latents.
        seed: of the starts, crops and flips.
        clip: the arms are videos, of which it says what frames to take. None, or one frame: they are images.
        numbers: by which the rows are called, where they were selected from others; None: their positions.

    Attributes:
        num_ties, num_unlabelled: rows that were left out; with soft labels, ties are counted and stay.

    Raises:
        DatasetError: columns of no known format, labels out of range; on access, a broken image or video, one in the
            place of the other, or an empty prompt, naming the row of `dataset`.
        ConfigurationError: images or videos without a transform.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        fmt: PreferenceFormat | None = None,
        transform: PairedTransform | None = None,
        seed: int = 0,
        clip: ClipSampler | None = None,
        numbers: np.ndarray | None = None,
    ) -> None:
        self.fmt = fmt or detect_format(dataset.column_names)
        self._numbers = numbers
        _check_transform(self.fmt, transform)
        self.transform = transform
        self.seed = seed
        self.clip = of_videos(clip)
        self._rows = undecoded(dataset, self.fmt)
        selection = select_pairs(dataset, self.fmt)
        self.num_ties, self.num_unlabelled = selection.num_ties, selection.num_unlabelled
        self._row_numbers = selection.kept
        self._epoch = _shared_integers(1)

    def with_arms(self, arms: Arms) -> "PreferenceDataset":
        """The same rows, with samples made of other arms. Raises DatasetError where they cannot be."""
        if arms == self.fmt.arms:
            return self
        options = {"transform": self.transform, "seed": self.seed, "clip": self.clip, "numbers": self._numbers}
        return PreferenceDataset(self._rows, self.fmt.with_arms(arms), **options)

    def set_epoch(self, epoch: int) -> None:
        """Choose the starts, crops and flips of this epoch. Reaches running (persistent) workers."""
        self._epoch[0] = epoch

    @property
    def fingerprint(self) -> str:
        """Of the rows, which of them are pairs, and how their media are read: equal for equal pairs in equal order."""
        parts = (self._rows._fingerprint, self._row_numbers.tobytes(), self.fmt, self.transform, self.clip)
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=16)
        # Rows that hold paths stay what they are when the files behind them are made anew.
        for column in self.fmt.media_columns:
            for chunk in self._rows.data.column(column).chunks:
                digest.update(repr(list(file_states(chunk))).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._row_numbers) * self.fmt.samples_per_row

    def row_number(self, index: int) -> int:
        """What the row of a sample is called."""
        position = int(self._row_numbers[index // self.fmt.samples_per_row])
        return position if self._numbers is None else int(self._numbers[position])

    def stored_row(self, index: int) -> dict[str, Any]:
        """The row of a sample as it is stored, nothing decoded."""
        return self._rows[int(self._row_numbers[index // self.fmt.samples_per_row])]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # negative indices count from the end; beyond it, IndexError
        where = f"row {self.row_number(index)}"
        pair = self.fmt.samples(self.stored_row(index), where=where)[index % self.fmt.samples_per_row]
        if self.fmt.holds_latents:
            return {**read_latents(pair, where=where), **_label(pair), "pair_index": index}
        generator = seeded_generator(self.seed, int(self._epoch[0]), index)
        return {**_pixels(pair, self.transform, self.clip, generator, where), **_label(pair), "pair_index": index}


class StreamingPreferenceDataset(torch.utils.data.IterableDataset):
    """The pairs of a `datasets.IterableDataset`, skipping and counting ties and unlabelled rows.

    Items are those of `PreferenceDataset`, except that `pair_index` is a 63-bit hash of the pair's prompt and stored
    images, because a stream has no row numbers that all workers agree on. The crop and the flip are keyed by it: they
    do not depend on workers or processes either, but differ from those of the map-style dataset.

    The workers of a data loader share the shards of `dataset` (a worker without a shard yields nothing); across
    processes split it first with `datasets.distributed.split_dataset_by_node`.

    Args:
        dataset, fmt, transform, seed, clip: as for `PreferenceDataset`; without known columns the first row is looked
            at.

    Raises:
        DatasetError: columns of no known format, or an empty stream; on iteration a broken row, named by its position
            among the rows that the worker has read.
        ConfigurationError: images or videos without a transform.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        fmt: PreferenceFormat | None = None,
        transform: PairedTransform | None = None,
        seed: int = 0,
        clip: ClipSampler | None = None,
    ) -> None:
        self.fmt = fmt or detect_format(stream_columns(dataset))
        _check_transform(self.fmt, transform)
        self.transform = transform
        self.seed = seed
        self.clip = of_videos(clip)
        self._rows = undecoded(dataset, self.fmt)
        self._without_media = np.empty(0, dtype=np.int64)
        self._epoch = _shared_integers(1)
        self._dropped = _shared_integers(_MAX_WORKERS, 2)  # a slot per worker: increments of one slot would race

    @property
    def fingerprint(self) -> str:
        """Of how the pairs are read, but not of which they are: that a stream does not say."""
        parts = ("stream", self.fmt, self.transform, self.clip)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def with_arms(self, arms: Arms) -> "StreamingPreferenceDataset":
        """The same stream, with samples made of other arms. Raises DatasetError where they cannot be."""
        stream = copy.copy(self)
        stream.fmt = self.fmt if arms == self.fmt.arms else self.fmt.with_arms(arms)
        return stream

    def without_media_of(self, known: np.ndarray) -> "StreamingPreferenceDataset":
        """The same stream, in which some pairs are `{"pair_index": ...}` alone, so that their media are not decoded.

        Args:
            known: their indices, int64, ascending.
        """
        stream = copy.copy(self)
        stream._without_media = known
        return stream

    @property
    def num_ties(self) -> int:
        """Ties skipped so far in this pass, by all workers of this process."""
        return int(self._dropped[:, 0].sum())

    @property
    def num_unlabelled(self) -> int:
        """Unlabelled rows skipped so far in this pass, by all workers of this process."""
        return int(self._dropped[:, 1].sum())

    def set_epoch(self, epoch: int) -> None:
        """Choose the starts, crops, flips and, where the stream is shuffled, the order of this epoch."""
        self._epoch[0] = epoch
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        slot = self._dropped[worker]
        slot.zero_()
        if worker == 0:
            self._dropped[num_workers:].zero_()  # left over from a pass with more workers
        for position, row in enumerate(stream_rows(self._rows)):
            where = f"row {position} read by worker {worker}" if info else f"row {position}"
            if self.fmt.is_unlabelled(row):
                slot[1] += 1
            elif not self.fmt.soft_labels and self.fmt.is_tie(row, where=where):
                slot[0] += 1
            elif not self.fmt.is_disliked(row, where=where):
                for sample in self.fmt.samples(row, where=where):
                    yield self._item(sample, where)

    def _item(self, pair: Mapping[str, Any], where: str) -> dict[str, Any]:
        index = pair_fingerprint(pair)
        place = np.searchsorted(self._without_media, index)
        if place < len(self._without_media) and self._without_media[place] == index:
            return {"pair_index": index}
        if self.fmt.holds_latents:
            return {**read_latents(pair, where=where), **_label(pair), "pair_index": index}
        generator = seeded_generator(self.seed, int(self._epoch[0]), index)
        return {**_pixels(pair, self.transform, self.clip, generator, where), **_label(pair), "pair_index": index}


def stream_columns(dataset: datasets.IterableDataset) -> list[str]:
    """The columns of a stream; where they are not declared, those of its first row.

    Raises:
        DatasetError: the stream is empty.
    """
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(first_row(dataset))


def first_row(dataset: datasets.IterableDataset) -> dict[str, Any]:
    """The first row of a stream. Raises DatasetError when it is empty."""
    for row in stream_rows(dataset):
        return row
    raise DatasetError("the dataset is empty: the stream has no rows")


def stream_rows(dataset: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a stream. Raises DatasetError where it cannot be read on, whatever its reader raises."""
    number = 0
    try:
        for row in dataset:
            yield row
            number += 1
    except (ConfigurationError, DatasetError):
        raise
    except UnicodeDecodeError as error:
        raise DatasetError(f"the stream cannot be read beyond {number} rows: a text is no UTF-8 ({error})") from error
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise DatasetError(
            f"the stream cannot be read beyond {number} rows: {type(error).__name__}: {error}"
        ) from error


def arms_of(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The arms of a sample by name, the chosen one first."""
    return {arm: pair[arm] for arm in ("chosen", "rejected") if arm in pair}


def open_arms(pair: Mapping[str, Any], *, where: str) -> tuple[Image.Image, ...]:
    """The images of a sample, as RGB. Raises DatasetError naming the row and the arm."""
    return tuple(open_image(value, where=f"{where}, the {arm} image") for arm, value in arms_of(pair).items())


def of_videos(clip: ClipSampler | None) -> ClipSampler | None:
    """None where the arms are images: without a sampler, or with one of a single frame."""
    return None if clip is None or clip.num_frames == 1 else clip


def read_latents(pair: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """`{"prompt", "chosen_latents", "rejected_latents"}`, the latents float32.

    Raises:
        DatasetError: latents that are no regular array of finite numbers, or of different shapes.
    """
    latents = {arm: _latent_array(value, f"{where}, the {arm} latents") for arm, value in arms_of(pair).items()}
    shapes = [tuple(array.shape) for array in latents.values()]
    if shapes[0] != shapes[-1]:
        raise DatasetError(f"{where}: chosen and rejected latents differ in shape, {shapes[0]} and {shapes[1]}")
    return {"prompt": pair["prompt"], **{f"{arm}_latents": array for arm, array in latents.items()}}


def pair_fingerprint(pair: Mapping[str, Any]) -> int:
    """A 63-bit hash of the prompt and of the arms as they are stored: the same on every worker and process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (pair["prompt"], *arms_of(pair).values()):
        content = _stored_bytes(part)
        digest.update(len(content).to_bytes(8, "big"))  # so that parts cannot run into each other
        digest.update(content)
    return int.from_bytes(digest.digest(), "big") >> 1


def _stored_bytes(value: Any) -> bytes:
    value = stored_value(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image.Image):
        return value.tobytes()
    if isinstance(value, list | tuple) and value and isinstance(value[0], str | bytes | Mapping | Image.Image):
        return b"".join(hashlib.blake2b(_stored_bytes(frame)).digest() for frame in value)
    if isinstance(value, list | tuple | np.ndarray | torch.Tensor):
        is_clip = not isinstance(value, list | tuple) and np.asarray(value).dtype.kind in "iu"
        try:
            return np.asarray(value, dtype=None if is_clip else np.float32).tobytes()
        except (TypeError, ValueError, OverflowError):  # no regular array of numbers, which is said where it is read
            return repr(value).encode("utf-8", "surrogatepass")
    return str(value).encode("utf-8", "surrogatepass")


def _latent_array(value: Any, where: str) -> torch.Tensor:
    try:
        array = np.array(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{where} are no regular array of numbers ({error})") from error
    if array.ndim == 0 or array.size == 0 or not np.isfinite(array).all():
        raise DatasetError(f"{where} are empty, or hold values that are not finite (shape {array.shape})")
    return torch.from_numpy(array)


def _pixels(
    pair: Mapping[str, Any],
    transform: PairedTransform | None,
    clip: ClipSampler | None,
    generator: torch.Generator,
    where: str,
) -> dict[str, Any]:
    assert transform is not None, "checked on construction"
    rate = {}
    media: Sequence[Any]
    if clip is None:
        media = open_arms(pair, where=where)
    else:
        media, rate["frame_rate"] = open_arms_clips(arms_of(pair), clip, generator, where=where)
    pixels = zip(arms_of(pair), transform.of_arms(media, generator), strict=True)
    return {"prompt": pair["prompt"], **{f"{arm}_pixels": tensor for arm, tensor in pixels}, **rate}


def _label(pair: Mapping[str, Any]) -> dict[str, float]:
    return {"label": pair["label"]} if "label" in pair else {}


def _check_transform(fmt: PreferenceFormat, transform: PairedTransform | None) -> None:
    if transform is None and not fmt.holds_latents:
        raise ConfigurationError("images and videos need a transform: pass PairedTransform(resolution=...)")


def _shared_integers(*shape: int) -> torch.Tensor:
    """Zeros that worker processes see change."""
    return torch.zeros(shape, dtype=torch.int64).share_memory_()
