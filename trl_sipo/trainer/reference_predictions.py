# SPDX-License-Identifier: Apache-2.0
"""Predictions of the reference by pair and draw, on disk: what the proximal term needs of a reference that is gone.

A file for each draw, a row for each pair: the predictions for the chosen and the rejected arm, in the dtype that the
reference predicts in, so that nothing is lost, and a checksum of both, by which a row that was not written to its end
is told from one that was. Rows are read one by one: of all that is stored, memory holds those of a step.
"""

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.preference_dataset import StreamingPreferenceDataset
from trl_sipo.errors import ConfigurationError, DatasetError, StorageError

_CHECKSUM_BYTES = 4
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PredictionStore:
    """The predictions of a dataset's pairs.

    Args:
        folder: Of the files; it need not be there.
        num_pairs: Called 0, 1, 2, ...
        shape: Of the prediction for one arm.
        dtype: That the reference predicts in.
    """

    def __init__(self, folder: Path, num_pairs: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.folder = folder
        self.num_pairs = num_pairs
        self.shape = tuple(shape)
        self.dtype = dtype
        self._payload_bytes = 2 * torch.Size(shape).numel() * dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one draw of one pair, both arms."""
        return self._payload_bytes + _CHECKSUM_BYTES

    def num_bytes(self, num_draws: int) -> int:
        """Bytes of so many draws of all pairs."""
        return self.num_pairs * num_draws * self.row_bytes

    def is_whole(self, num_draws: int) -> bool:
        """Whether the files of the first draws are there, and as long as they should be."""
        files = [self._file(draw) for draw in range(num_draws)]
        return all(file.is_file() and file.stat().st_size == self.num_bytes(1) for file in files)

    def make(self, num_draws: int) -> None:
        """Make the files of the first draws that are not there, with nothing in them. Raises StorageError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for draw in range(num_draws):
                with open(self._file(draw), "ab") as file:
                    file.truncate(self.num_bytes(1))
        except OSError as error:  # a quota, or a file system that has no files of this size
            raise StorageError(
                f"The predictions of the reference cannot be kept in {str(self.folder)!r}, in files of "
                f"{in_bytes(self.num_bytes(1))} for each draw ({error}). Set HF_HOME to a folder that can hold them, "
                "or compute the reference live (`precompute_ref_log_probs=False`)."
            ) from error

    def write(self, ids: torch.Tensor, draw: int, predictions: Sequence[torch.Tensor]) -> None:
        """Write one draw of some pairs.

        Args:
            ids: (batch,) int64.
            draw: Which one.
            predictions: For the chosen and the rejected arm, (batch, ...) each, of any dtype that holds no more than
                that of the files.

        Raises:
            ConfigurationError: They are of another shape, or would be rounded.
            StorageError: The disk is full, or cannot be written.
        """
        stored = [self._as_stored(one.detach().cpu()) for one in predictions]
        rows = torch.stack(stored, dim=1).contiguous().view(len(ids), -1).view(torch.uint8).numpy()
        try:
            with open(self._file(draw), "r+b") as file:
                for pair, row in zip(ids.tolist(), rows, strict=True):
                    file.seek(pair * self.row_bytes)
                    file.write(row.tobytes() + _checksum(row))
        except OSError as error:
            raise StorageError(
                f"The predictions of the reference cannot be written into {str(self.folder)!r} ({error}; "
                f"{in_bytes(free_bytes(self.folder))} are free). What was computed before is kept, and the next run "
                "goes on from there: make room, or compute the reference live."
            ) from error

    def read(self, ids: torch.Tensor, draw: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions (chosen, rejected), (batch, ...) each, on the CPU.

        Args:
            ids: (batch,) int64.
            draw: One for all pairs, or (batch,) integers.

        Raises:
            DatasetError: What is stored of a pair is damaged, or not there.
        """
        draws = draw.tolist() if isinstance(draw, torch.Tensor) else [draw] * len(ids)
        rows = [self._row(pair, number) for pair, number in zip(ids.tolist(), draws, strict=True)]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def _file(self, draw: int) -> Path:
        return self.folder / f"draw-{draw:04d}.bin"

    def _as_stored(self, prediction: torch.Tensor) -> torch.Tensor:
        """In the dtype of the files, which must lose nothing."""
        if prediction.shape[1:] != self.shape:
            raise ConfigurationError(
                f"`precompute_ref_predictions=True` made room for predictions of the shape {self.shape}, and the "
                f"reference predicts {tuple(prediction.shape[1:])}: the data is of another size than `resolution` and "
                "`num_frames` say. Set these, or compute the reference live."
            )
        stored = prediction.to(self.dtype)
        is_same = (stored.to(prediction.dtype) == prediction) | prediction.isnan()  # what is NaN is refused later
        if not is_same.all():
            raise ConfigurationError(
                f"`precompute_ref_predictions=True` stores {_name_of(self.dtype)}, and the reference predicts numbers "
                f"of {_name_of(prediction.dtype)} that would be rounded. Compute the reference live."
            )
        return stored

    def _row(self, pair: int, draw: int) -> torch.Tensor:
        """(2, ...)"""
        try:
            with open(self._file(draw), "rb") as file:
                file.seek(pair * self.row_bytes)
                row = file.read(self.row_bytes)
        except OSError as error:
            raise self._damaged(pair, draw, error) from error
        payload, checksum = row[: self._payload_bytes], row[self._payload_bytes :]
        if len(row) != self.row_bytes or _checksum(payload) != checksum:
            raise self._damaged(pair, draw, "its checksum is another one")
        return torch.frombuffer(bytearray(payload), dtype=self.dtype).view(2, *self.shape)

    def _damaged(self, pair: int, draw: int, why: object) -> DatasetError:
        return DatasetError(
            f"The prediction of the reference for the pair {pair} in draw {draw} cannot be read from "
            f"{str(self._file(draw))!r} ({why}). Remove {str(self.folder)!r}: the next run computes it anew."
        )


def _checksum(payload: Any) -> bytes:
    return zlib.crc32(payload).to_bytes(_CHECKSUM_BYTES, "little")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_has_predictions(dataset: Any, name: str) -> None:
    """Raise [`ConfigurationError`] for data whose predictions have no place that is known beforehand.

    Args:
        dataset: As a trainer has it.
        name: What it is called.
    """
    advice = "or compute the reference live (`precompute_ref_log_probs=False`)."
    if isinstance(dataset, StreamingPreferenceDataset):
        raise ConfigurationError(
            "`precompute_ref_predictions=True` makes room for the predictions of all pairs beforehand, and the "
            f"{name} dataset is a stream, whose length is not known. Give a dataset that is none, {advice}"
        )
    if isinstance(dataset, CachedPairs) and (len(dataset.latent_shapes()) > 1 or _shape_of(dataset) is None):
        raise ConfigurationError(
            f"`precompute_ref_predictions=True` stores predictions of one shape, and the {name} cache has arms of "
            f"{sorted(dataset.latent_shapes())}. Encode it without `--buckets`, {advice}"
        )


def _shape_of(dataset: CachedPairs) -> tuple[int, ...] | None:
    """Of the latents of both arms; `None`: they differ."""
    chosen, rejected = next(iter(dataset.latent_shapes()))
    return tuple(chosen) if chosen == rejected else None


def store_for(trainer: Any, dataset: Any, bank: Path) -> PredictionStore:
    """The predictions of a trainer's dataset, which lie beside the file of its errors."""
    shape = _shape_of(dataset) if isinstance(dataset, CachedPairs) else None
    if shape is None:
        shape = trainer.adapter.latent_shape(*trainer.size, trainer.args.num_frames)
    return PredictionStore(bank.with_suffix(".predictions"), len(dataset), shape, prediction_dtype(trainer))


def prediction_dtype(trainer: Any) -> torch.dtype:
    """What the reference predicts in: the dtype of autocast where there is one, else that of the weights."""
    of_weights = trainer.adapter.input_dtype(trainer.unwrapped_model)
    return _PRECISIONS.get(trainer.accelerator.mixed_precision, of_weights)


def describe_cost(name: str, store: PredictionStore, num_draws: int) -> str:
    """What the predictions of a dataset take, as a product."""
    size = "x".join(map(str, store.shape))
    return (
        f"{name}: {store.num_pairs:,} pairs x {num_draws} draws x 2 arms x {size} x {store.dtype.itemsize} bytes "
        f"({_name_of(store.dtype)}) = {in_bytes(store.num_bytes(num_draws))}"
    )


def check_room(folder: Path, missing: int) -> None:
    """Raise [`ConfigurationError`] unless so many bytes are free where `folder` lies, or will lie."""
    free = free_bytes(folder)
    if missing > free:
        raise ConfigurationError(
            f"`precompute_ref_predictions=True` needs {in_bytes(missing)} more in {str(folder)!r}, and "
            f"{in_bytes(free)} are free on its disk. Make room, set HF_HOME to a folder on a larger disk, lower "
            "`num_ref_draws` or `eval_noise_levels`, or compute the reference live (`precompute_ref_log_probs=False`)."
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder lies on, or will lie on."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def in_bytes(number: int) -> str:
    """A number of bytes for people."""
    letter, power = ("G", 3) if number >= 1e9 else ("M", 2)
    return f"{number:,} bytes ({number / 1000**power:,.2f} {letter}B, {number / 1024**power:,.2f} {letter}iB)"
