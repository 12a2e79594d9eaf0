# SPDX-License-Identifier: Apache-2.0
"""Paths of images and videos that a table names: where they begin, and the folders that they must not leave.

Who wrote a table also decides which files of this machine it names. What lies outside of the table's folder is
therefore refused, unless the user names the folder that it lies in (`media_folder`). Links are part of the user's file
system, not of the table: they are followed, and said.
"""

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset, List, Value, Video

from trl_sipo.data.formats import FORMATS, PAIRS
from trl_sipo.data.preference_dataset import first_row
from trl_sipo.data.readers import READERS
from trl_sipo.data.stored import is_address, looks_like_text, quoted_path
from trl_sipo.errors import DatasetError

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 1000


def media_folders(
    folder: Path, tables: Sequence[Path] = (), media_folder: str | os.PathLike[str] | None = None
) -> list[Path]:
    """Where relative paths may begin: a path is taken in the first folder that has such a file.

    Args:
        folder: that holds the tables.
        tables: a folder of the name of one of them, beside it, counts too.
        media_folder: the only folder, if it is given.
    """
    if media_folder is not None:
        return [Path(media_folder).expanduser().resolve()]
    beside = dict.fromkeys(folder / table.stem for table in tables)
    return [folder, *(candidate for candidate in beside if candidate.is_dir())]


def with_absolute_paths(dataset: Dataset | IterableDataset, folders: list[Path]) -> Dataset | IterableDataset:
    """The rows with relative paths of their media made absolute.

    Args:
        dataset: of whatever layout.
        folders: where relative paths begin, and all paths must lead.

    Raises:
        DatasetError: a path leads out of the folders; names the row. Of a stream, when that row is read.
    """
    columns = _path_columns(dataset)
    roots = (*map(str, folders), *_caches())
    if columns:
        is_stream = isinstance(dataset, IterableDataset)

        def absolute(*values: list[Any]) -> dict[str, list[Any]]:
            *columns_of_paths, numbers = values
            found = {
                column: [
                    _absolute(path, folders, roots, f"row {number}, column {column!r}")
                    for number, path in zip(numbers, paths, strict=True)
                ]
                for column, paths in zip(columns, columns_of_paths, strict=True)
            }
            if is_stream:
                warn_of_links(_flat(found.values()), roots)
            return found

        options = {"batched": True, "input_columns": columns, "with_indices": True, "features": dataset.features}
        dataset = dataset.map(absolute, **options)
        if isinstance(dataset, Dataset):  # apart from the map, which `datasets` remembers
            warn_of_links(_flat(dataset.with_format(None)[column] for column in columns), roots)
    if isinstance(dataset, Dataset):
        _check_structs(dataset, roots)
    return dataset


def checked_path(path: str, roots: Sequence[str], where: str) -> str:
    """A path, if it does not lead out of the folders.

    Raises:
        DatasetError: it does; names it, and the way out.
    """
    if _is_below(path, roots) or _is_inside(os.path.realpath(path), tuple(map(os.path.realpath, roots))):
        return path
    raise DatasetError(
        f"{where}: the path {quoted_path(path)} leads out of {roots[0]!r}. A table names files within its own folder; "
        "if these are meant, name the folder that they may be read from: `--dataset_media_folder` (`media_folder`). "
        "Relative paths then begin there."
    )


def warn_of_links(paths: Iterable[str], roots: Sequence[str]) -> None:
    """Say that files lie elsewhere, as links tell; once for each folder that they lead to."""
    real_roots = tuple(map(os.path.realpath, roots))
    is_inside: dict[str, bool] = {}
    for path in paths:
        folder = os.path.dirname(path)
        if folder not in is_inside:
            is_inside[folder] = _is_inside(os.path.realpath(folder), real_roots)
        if is_inside[folder] and not os.path.islink(path):
            continue
        real = os.path.realpath(path)
        if not _is_inside(real, real_roots):
            _warn_of_link(folder, os.path.dirname(real))


@functools.cache
def _warn_of_link(folder: str, real_folder: str) -> None:
    logger.warning("Links in %s lead out of the data's folder, to %s: media are read from there.", folder, real_folder)


def _caches() -> tuple[str, ...]:
    """Where the libraries put what they download: snapshots of the hub are links into such a folder."""
    return (str(huggingface_hub.constants.HF_HUB_CACHE), str(datasets.config.HF_DATASETS_CACHE))


def _is_inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def _is_below(path: str, roots: Iterable[str]) -> bool:
    """Whether a path leads into one of the folders as it stands; `..` behind a link may lead anywhere."""
    return ".." not in path.split(os.sep) and _is_inside(path, roots)


def _flat(columns: Iterable[Iterable[Any]]) -> Iterator[str]:
    for column in columns:
        for value in column:
            paths = value if isinstance(value, list) else [value]
            yield from (path for path in paths if isinstance(path, str) and os.path.isabs(path) and "\0" not in path)


def _path_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Columns of arms that hold strings, or lists of them; or may hold them, where types are not known."""
    if dataset.features is None:  # a stream whose types are not known before it is read
        return _arms(first_row(dataset))  # the first cell may be null
    return [column for column in _arms(dataset.features) if _holds_paths(dataset.features[column])]


def _arms(columns: Iterable[str]) -> list[str]:
    """Those of some columns that hold images or videos; single ones beside pairs are not read."""
    found = set(columns)
    layouts = [*(fmt.required_columns for fmt in PAIRS.values()), *(reader.columns for reader in READERS.values())]
    has_pairs = any(set(layout) <= found for layout in layouts)
    formats = (PAIRS if has_pairs else FORMATS).values()
    arms = {column for fmt in formats if not fmt.holds_latents for column in fmt.media_columns}
    arms |= {column for reader in READERS.values() for column in reader.paths}
    return [column for column in columns if column in arms]


def _absolute(path: Any, folders: list[Path], roots: Sequence[str], where: str) -> Any:
    """A path, or a list of those of frames, relative to one of the folders; what is absolute, or no path, stays."""
    if isinstance(path, list):
        return [_absolute(frame, folders, roots, where) for frame in path]
    if not isinstance(path, str) or is_address(path) or "\0" in path:
        return path
    if looks_like_text(path) and not any(os.path.exists(folder / path) for folder in folders):
        # Refused when it is opened, as a text; unless it is a file after all, seen from the working directory.
        return checked_path(os.path.abspath(path), roots, where) if os.path.exists(path) else path
    if len(folders) == 1:  # a look at the disk per path takes minutes where there are millions
        return checked_path(str(folders[0] / path), roots, where)
    found = next((folder / path for folder in folders if os.path.exists(folder / path)), folders[0] / path)
    return checked_path(str(found), roots, where)


def _check_structs(dataset: Dataset, roots: Sequence[str]) -> None:
    """Look at the paths of images and videos that are stored with a place for their bytes, which is empty."""
    columns = _arms(dataset.features)
    for column in (name for name in columns if isinstance(dataset.features[name], Image | Video)):
        rows = dataset.select_columns([column]).with_format("arrow")
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            values = rows[start : start + _ROWS_AT_A_TIME][column].combine_chunks()
            missing = pc.is_null(pc.struct_field(values, "bytes")).to_pylist()
            paths = pc.struct_field(values, "path").to_pylist() if any(missing) else []
            for row, (is_missing, path) in enumerate(zip(missing, paths, strict=False), start):
                if is_missing and path is not None and not is_address(path):
                    path = checked_path(os.path.abspath(path), roots, f"row {row}, column {column!r}")
                    warn_of_links([path], roots)


def _holds_paths(feature: Any) -> bool:
    feature = feature.feature if isinstance(feature, List) else feature
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
