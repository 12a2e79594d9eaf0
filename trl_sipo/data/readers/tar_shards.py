# SPDX-License-Identifier: Apache-2.0
"""Tar shards in the manner of WebDataset: consecutive files of one name, whose suffixes name the columns.

`00017.jpg_0.jpg`, `00017.label_0.txt`, ... are the columns `jpg_0.jpg`, `label_0.txt`, ... of one row. `datasets` has
a loader of its own for them, which reports every load to the hub.
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value

from trl_sipo.data.stored import FRAME_SUFFIXES
from trl_sipo.errors import DatasetError

_NAME = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")
_TEXT_SUFFIXES = (".txt", ".text", ".json", ".cls")
_BLOCK = 512
_LARGEST = 2**31 - 1  # bytes: what a cell of a table holds
_Shard = tuple[str, int, int]  # path, bytes and time of change: a shard that changed is read anew


def read_tar_shards(paths: Sequence[str | Path]) -> Dataset:
    """All rows of some shards, in order. They are copied once, into the cache of `datasets`; a stream is not."""
    return Dataset.from_generator(_rows, **_generator_options(paths))


def stream_tar_shards(paths: Sequence[str | Path]) -> IterableDataset:
    """The same as a stream; the workers of a data loader share the shards."""
    return IterableDataset.from_generator(_rows, **_generator_options(paths))


def tar_samples(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of one shard: column to text or bytes, and `__key__`, the name that its files share.

    Raises:
        DatasetError: the shard is broken or cut off, holds links or devices, a file has no suffix, or a row has a
            column twice.
    """
    _check_end(Path(path))
    sample: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isdir():
                    continue
                _check_member(path, member)
                key, column = _key_and_column(path, member.name)
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                if column in sample:
                    raise DatasetError(f"{path}: the row {key!r} has two files {column!r}")
                content = archive.extractfile(member).read()
                if len(content) != member.size:
                    raise DatasetError(f"{path} is cut off within {member.name!r}")
                sample["__key__"] = key
                sample[column] = content.decode("utf-8") if column.endswith(_TEXT_SUFFIXES) else content
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if sample:
        yield sample


def _check_member(path: str | Path, member: tarfile.TarInfo) -> None:
    """Files alone are read, into memory: nothing is unpacked, so that their names, whatever they are, lead nowhere."""
    if not member.isfile():
        kind = "a link" if member.islnk() or member.issym() else "a device or pipe"
        raise DatasetError(f"{path}: {member.name!r} is {kind}; a shard holds files and folders alone")
    if member.size > _LARGEST:
        raise DatasetError(f"{path}: {member.name!r} says that it has {member.size} bytes, more than {_LARGEST}")


def _check_end(path: Path) -> None:
    """An archive ends with blocks of zeros; `tarfile` takes one that was cut off between two files for whole."""
    if path.suffix == ".tar" and path.is_file():
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _BLOCK, 0))
            if file.read().strip(b"\0"):
                raise DatasetError(f"{path} is cut off: it has no end of archive")


def _key_and_column(path: str | Path, name: str) -> tuple[str, str]:
    match = _NAME.match(name)
    if match is None:
        raise DatasetError(f"{path}: the file {name!r} has no suffix that could name its column")
    return match[1], match[2]


def _features(paths: Sequence[str | Path]) -> Features:
    """The columns of the first row of the first shard."""
    for sample in tar_samples(paths[0]):
        return Features({column: _feature(column) for column in sample})
    raise DatasetError(f"{paths[0]} is empty: it holds no files")


def _feature(column: str) -> Any:
    if column == "__key__" or column.endswith(_TEXT_SUFFIXES):
        return Value("string")
    return Image(decode=False) if Path(column).suffix.lower() in FRAME_SUFFIXES else Value("binary")


def _generator_options(paths: Sequence[str | Path]) -> dict[str, Any]:
    shards = [(str(path), Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]
    features = _features(paths)
    return {"features": features, "gen_kwargs": {"shards": shards, "columns": tuple(features)}}


def _rows(shards: list[_Shard], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows with all of the columns, null where a row lacks one: such a row is refused, or listed, as a bad one."""
    for path, _, _ in shards:
        for sample in tar_samples(path):
            unknown = sample.keys() - set(columns)
            if unknown:
                raise DatasetError(f"{path}: the row {sample['__key__']!r} has {sorted(unknown)}, the first row not")
            yield {column: _cell(sample.get(column), column) for column in columns}


def _cell(content: Any, column: str) -> Any:
    is_image = isinstance(content, bytes) and Path(column).suffix.lower() in FRAME_SUFFIXES
    return {"bytes": content, "path": None} if is_image else content
