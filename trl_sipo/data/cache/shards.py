# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and reading rows of tensors out of them without mapping them into memory."""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trl_sipo.errors import DatasetError, StorageError

# Names of the safetensors format. https://github.com/huggingface/safetensors#format
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAX_OPEN_FILES = 256
_MOST_ROWS = 2**48  # in one direction: a shape without numbers may say anything
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors format has it


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name beside `path`, bring it to the disk, and give it its name.

    Whenever the process is killed, `path` is whole or not there. Files that such a kill left behind are removed.

    Raises:
        StorageError: it cannot be written: no space is left, say.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for torn in path.parent.glob(f".{path.name}.*.tmp"):
            torn.unlink(missing_ok=True)
        write(temporary)
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that nobody else can read
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{str(path)!r} cannot be written: {error}. What was written before is whole. Make room on the disk, or "
            "mend what else is the matter with it, and run the same command again, which goes on from there."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    # Without metadata, whose order in the file would change from one process to another.
    content = {name: value.contiguous() for name, value in tensors.items()}
    write_whole(path, lambda temporary: save_file(content, temporary))


def ragged(name: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of one dtype and number of dimensions as three: a header with an entry for each would take long to read.

    Returns:
        `name`: their numbers, one after the other; `<name>.starts`: where each begins, and the end; `<name>.shapes`.
    """
    starts = torch.tensor([0, *(tensor.numel() for tensor in tensors)]).cumsum(0)
    shapes = torch.tensor([tensor.shape for tensor in tensors], dtype=torch.int64)
    return {
        name: torch.cat([tensor.flatten() for tensor in tensors]),
        f"{name}.starts": starts,
        f"{name}.shapes": shapes.reshape(len(tensors), -1),
    }


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Stored:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def _stored(entry: Mapping[str, Any], begin: int, size: int) -> _Stored:
    """An entry of a header, if the numbers in it agree with one another and with the file."""
    dtype, shape, (first, last) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"the header has {shape} and {first, last} for a shape and offsets")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the header has {last - first} bytes for {shape} numbers of {dtype}")
    if max(shape, default=0) > _MOST_ROWS:
        raise ValueError(f"the header has the shape {shape}")
    if begin + last > size:
        raise ValueError(f"it ends after {size} of {begin + last} bytes")
    return _Stored(dtype, shape, begin + first, last - first)


class TensorFile:
    """A safetensors file, read by position.

    The file is not mapped: pages of a mapping count as the process's memory, which would then grow with the data.

    Raises:
        DatasetError: the file is not there, or not a whole safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DatasetError(f"the shard {str(path)!r} cannot be read: {error.strerror}") from error
        try:
            self._stored = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # whatever is no header
            os.close(self._descriptor)
            raise self.damaged(f"{type(error).__name__}: {error}") from error

    def damaged(self, reason: str) -> DatasetError:
        """An error to raise when what was read cannot be what was written."""
        return DatasetError(
            f"the shard {str(self.path)!r} is damaged ({reason}): remove it, and run `trl-sipo encode` again, which "
            "writes what is missing"
        )

    def _read_header(self) -> dict[str, _Stored]:
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        size = os.fstat(self._descriptor).st_size
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError("it has no header")
        header = json.loads(os.pread(self._descriptor, length, 8))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _stored(entry, 8 + length, size) for name, entry in entries.items()}

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def _entry(self, name: str) -> _Stored:
        if name not in self._stored:
            raise self.damaged(f"it has no {name!r}")
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        entry = self._entry(name)
        return self._read(entry.dtype, entry.shape, entry.start, entry.num_bytes)

    def row(self, name: str, index: int) -> torch.Tensor:
        """One row of a tensor's first dimension."""
        entry = self._entry(name)
        if not entry.shape:
            raise self.damaged(f"its {name!r} has no rows")
        if not 0 <= index < entry.shape[0]:
            raise DatasetError(
                f"the shard {str(self.path)!r} has {entry.shape[0]} rows, no row {index}: it is of "
                "another cache than its index"
            )
        num_bytes = entry.num_bytes // entry.shape[0]
        return self._read(entry.dtype, entry.shape[1:], entry.start + index * num_bytes, num_bytes)

    def ragged_row(self, name: str, index: int) -> torch.Tensor:
        """One of the tensors that [`ragged`] put on top of one another."""
        start, end = self._slice(f"{name}.starts", index, 2).tolist()
        shape = self.row(f"{name}.shapes", index).tolist()
        if min(shape, default=0) < 0 or math.prod(shape) != end - start:
            raise self.damaged(f"row {index} of {name!r} has {end - start} numbers, and the shape {shape}")
        return self._slice(name, start, end - start).reshape(shape)

    def _slice(self, name: str, start: int, length: int) -> torch.Tensor:
        """Some numbers of a tensor of one dimension."""
        entry = self._entry(name)
        size = entry.dtype.itemsize
        if len(entry.shape) != 1 or not 0 <= start <= start + length <= entry.shape[0]:
            raise self.damaged(f"{name!r} of the shape {entry.shape} has no numbers {start} to {start + length}")
        return self._read(entry.dtype, (length,), entry.start + start * size, length * size)

    def _read(self, dtype: torch.dtype, shape: tuple[int, ...], start: int, num_bytes: int) -> torch.Tensor:
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        content = bytearray(num_bytes)
        view, done = memoryview(content), 0
        while done < num_bytes:  # a single read stops at 2 GiB
            count = os.preadv(self._descriptor, [view[done:]], start + done)
            if count == 0:
                raise DatasetError(f"the shard {str(self.path)!r} became shorter while it was read")
            done += count
        return torch.frombuffer(content, dtype=dtype).reshape(shape)


class OpenFiles:
    """The files that were read last, kept open. Each process opens its own."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, TensorFile] = OrderedDict()

    def __getitem__(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        return self._files[path]

    def __getstate__(self) -> dict[str, object]:
        return {"_files": OrderedDict()}  # descriptors mean nothing to another process

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()
