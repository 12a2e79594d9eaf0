# SPDX-License-Identifier: Apache-2.0
"""Paths of images and videos that a table names: where they begin, and the folders that they must not leave.

Who wrote a table also decides which files of this machine it names. What lies outside of the table's folder is
therefore refused, unless the user names the folder that it lies in (`media_folder`). Links are part of the user's file
system, not of the table: they are followed, and said.
"""

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset, LargeList, List, Value, Video

from trl_sipo.data.formats import FORMATS, PAIRS, without_decoding
from trl_sipo.data.preference_dataset import first_row
from trl_sipo.data.readers import READERS
from trl_sipo.data.stored import is_address, looks_like_text, quoted_path
from trl_sipo.errors import DatasetError

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 1000
_PLACES = ("bytes", "path")  # of an object that is an image or a video; a text in the first would be opened too


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
    features = dataset.features or {}
    dataset = without_decoding(dataset)  # which would open files, and fetch addresses, before anyone has looked
    is_stream = isinstance(dataset, IterableDataset)
    columns = _path_columns(dataset)
    roots = (*map(str, folders), *_caches())
    if columns:

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
    if isinstance(dataset, Dataset):  # of a stream, the map has looked at them
        fetched = _check_structs(dataset, roots)
        arms = {column for fmt in FORMATS.values() for column in (fmt.first, fmt.second)}
        for column in arms & features.keys() - fetched:  # whoever looks at rows finds images in them, as before
            if isinstance(features[column], Image | Video):
                dataset = dataset.cast_column(column, features[column])
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


def _flat(values: Iterable[Any]) -> Iterator[str]:
    """The absolute paths in columns of cells, lists of frames and objects."""
    for value in values:
        if isinstance(value, str):
            if os.path.isabs(value) and "\0" not in value:
                yield value
        elif isinstance(value, Mapping):
            yield from _flat(value.get(name) for name in _PLACES)
        elif isinstance(value, Iterable) and not isinstance(value, bytes):
            yield from _flat(value)


def _path_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Columns of arms that hold paths; or may hold them, where types are not known.

    Of a stream, those of media too, whose bytes are read row by row in any case.
    """
    if dataset.features is None:  # a stream whose types are not known before it is read
        return _arms(first_row(dataset))  # the first cell may be null
    is_stream = isinstance(dataset, IterableDataset)
    arms = {column: dataset.features[column] for column in _arms(dataset.features)}
    return [column for column, feature in arms.items() if _holds_paths(feature) or (is_stream and _is_media(feature))]


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
    if isinstance(path, Mapping):  # an image or a video: its bytes, to which the path is but a name, or its path
        if isinstance(path.get("bytes"), bytes):
            return path
        found = {name: _absolute(part, folders, roots, where) for name, part in path.items() if name in _PLACES}
        return {**path, **found} if any(part is not None for part in found.values()) else None
    if not isinstance(path, str) or is_address(path) or "\0" in path:
        return path
    if looks_like_text(path) and not any(os.path.exists(folder / path) for folder in folders):
        # Refused when it is opened, as a text; unless it is a file after all, seen from the working directory.
        return checked_path(os.path.abspath(path), roots, where) if os.path.exists(path) else path
    if len(folders) == 1:  # a look at the disk per path takes minutes where there are millions
        return checked_path(str(folders[0] / path), roots, where)
    found = next((folder / path for folder in folders if os.path.exists(folder / path)), folders[0] / path)
    return checked_path(str(found), roots, where)


def _check_structs(dataset: Dataset, roots: Sequence[str]) -> set[str]:
    """Look at the paths of images and videos that are stored with a place for their bytes, which is empty.

    Returns:
        The columns that name addresses, which are refused when they are opened.
    """
    fetched = set()
    columns = _arms(dataset.features)
    for column in (name for name in columns if _is_media(dataset.features[name])):
        rows = dataset.select_columns([column]).with_format("arrow")
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            values = rows[start : start + _ROWS_AT_A_TIME][column].combine_chunks()
            for row, path in _paths_without_bytes(values):
                if is_address(path):
                    fetched.add(column)
                    continue
                path = checked_path(os.path.abspath(path), roots, f"row {start + row}, column {column!r}")
                warn_of_links([path], roots)
    return fetched


def _paths_without_bytes(values: pa.Array) -> Iterator[tuple[int, str]]:
    """Of a column of media, or of lists of them: the paths beside which there are no bytes, with their positions."""
    positions = np.arange(len(values))
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        positions = positions[pc.list_parent_indices(values).to_numpy()]
        values = pc.list_flatten(values)
    missing = pc.is_null(pc.struct_field(values, "bytes"))
    paths = pc.struct_field(values, "path").filter(missing).to_pylist()
    for position, path in zip(positions[missing.to_numpy(zero_copy_only=False)].tolist(), paths, strict=True):
        if path is not None:
            yield position, path


def _innermost(feature: Any) -> Any:
    """What lists of lists hold."""
    return _innermost(feature.feature) if isinstance(feature, List | LargeList) else feature


def _is_media(feature: Any) -> bool:
    """Whether `datasets` stores it with a place for bytes and one for a path, or lists of such."""
    return hasattr(_innermost(feature), "decode")


def _holds_paths(feature: Any) -> bool:
    """Whether it is of texts, or of objects that have one for a path, or lists of such."""
    feature = _innermost(feature)
    if isinstance(feature, dict):
        return any(_holds_paths(feature[name]) for name in _PLACES if name in feature)
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")
