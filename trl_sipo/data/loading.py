# SPDX-License-Identifier: Apache-2.0
"""Preference data from wherever it is: the hub, a saved dataset, tables of rows, folders of images, or plain lists."""

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, Value

from trl_sipo.data.cache.dataset import CachedPairs, find_cache
from trl_sipo.data.formats import FORMATS
from trl_sipo.data.image_folder import find_image_folders, read_image_folder
from trl_sipo.data.json_text import check_csv_header, check_json_lines
from trl_sipo.data.media_paths import media_folders, with_absolute_paths
from trl_sipo.data.preference_dataset import stream_columns
from trl_sipo.data.readers import read_source
from trl_sipo.data.readers.json_list import is_json_list, read_json_lists, stream_json_lists
from trl_sipo.data.readers.tar_shards import read_tar_shards, stream_tar_shards
from trl_sipo.data.readers.video_dpo import is_video_dpo_folder, read_video_dpo_folder
from trl_sipo.data.row_selection import confident_pairs, listed_rows, without_rows
from trl_sipo.errors import DatasetError

logger = logging.getLogger(__name__)


def _text_cell(cell: str) -> str | None:
    """Of a prompt in a CSV, which would be a number where all of them are: 007, 1984."""
    return cell or None


def _label_cell(cell: str) -> float | str | None:
    """Of a label in a CSV, which would be a whole number for all rows where it is one in the first thousands."""
    try:
        return float({"true": 1, "false": 0}.get(cell.lower(), cell)) if cell.strip() else None
    except ValueError:
        return cell  # refused where labels are read


# Suffix of a file: its readers, map-style and streaming. `load_dataset("json", ...)` would do the same and report each
# load to the hub, which takes seconds where there is no network.
_READERS: dict[str, tuple[Callable[..., Dataset], Callable[..., IterableDataset]]] = {
    ".parquet": (Dataset.from_parquet, IterableDataset.from_parquet),
    ".jsonl": (Dataset.from_json, IterableDataset.from_json),
    ".json": (Dataset.from_json, IterableDataset.from_json),  # of a record a line; lists have _JSON_LIST
    ".csv": (Dataset.from_csv, IterableDataset.from_csv),
    ".tar": (read_tar_shards, stream_tar_shards),
}
_JSON_LIST = (read_json_lists, stream_json_lists)
_TAKE_PATTERNS = {".parquet", ".jsonl", ".json", ".csv"}  # readers that would take a bracket in a path for a pattern
_OPTIONS: dict[str, dict[str, Any]] = {
    ".csv": {
        # Empty cells are null, the words NA and null are not.
        "keep_default_na": False,
        "na_values": [""],
        "converters": {
            **dict.fromkeys((fmt.prompt for fmt in FORMATS.values()), _text_cell),
            **dict.fromkeys((fmt.label for fmt in FORMATS.values() if fmt.label is not None), _label_cell),
        },
    },
}
# What is looked for in files before they are read.
_CHECKS: dict[str, Callable[[Path], None]] = {
    ".jsonl": check_json_lines,
    ".json": check_json_lines,
    ".csv": check_csv_header,
}
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SAVE_ANEW = "load it where it was made, and write it anew by `save_to_disk`"
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_SHARD = re.compile(r"(\w+)-(\d{5})-of-(\d{5})")
_MAX_STREAM_SHARDS = 64

_Loader = Callable[[], Dataset | IterableDataset]


def load_preference_dataset(
    name_or_path: str | os.PathLike[str] | Mapping[str, Sequence[Any]],
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    format: str | None = None,
    media_folder: str | os.PathLike[str] | None = None,
    min_confidence: float | None = None,
    skip_rows: str | os.PathLike[str] | None = None,
) -> Dataset | IterableDataset | CachedPairs:
    """Load preference data. Rows of a layout that `PreferenceDataset` recognises come as they are.

    Those of published datasets of another layout (`trl_sipo.data.readers.READERS`) become pairs.

    Args:
        name_or_path: one of

            - a local folder that `trl-sipo encode` wrote, or one with such a folder per split; gives `CachedPairs`;
            - a local folder that `save_to_disk` wrote;
            - a local folder `<root>` with `chosen/<id>.<suffix>`, `rejected/<id>.<suffix>` (png, jpg, jpeg, webp; mp4,
              webm, gif, mov, mkv, avi; or folders of frames, `<id>/`) and `metadata.csv` or `metadata.jsonl` with the
              columns `id` (or `file_name`) and `prompt`; or several such folders, `<root>/<split>`;
            - a local folder of VideoDPO, with `pair.json` and `metadata.json`;
            - a local folder of Parquet, JSON, JSON Lines or CSV files, or of tar shards, at any depth. A file belongs
              to the split that stands as a word in its name or else in its folder ("test.jsonl",
              "data/train-00000-of-00002.parquet"); without one, to "train";
            - one such file, which is the split that is asked for;
            - an id on the Hugging Face hub;
            - columns, as a mapping from names to lists.

            Relative paths of images and videos in a local table are relative to the folder of that table.
        name: configuration of a dataset on the hub; of a local folder, the folder within it.
        split: which split; slices ("train[:500]", "train[10%:20%]") work for all kinds, except when streaming.
        streaming: give a `datasets.IterableDataset`.
        format: what the columns are, a key of `READERS` or `FORMATS`; None: recognised.
        media_folder: where relative paths of images and videos begin, and what all of their paths must lie in. Without
            it, those of a local table begin in its folder, or in the folder beside it that has its name (`train.json`,
            `train/`); those of a dataset on the hub in the working directory.
        min_confidence: leave pairs out whose label is closer to a tie: at least this share of votes must be for one
            side. None: none.
        skip_rows: a JSON Lines file of `{"row": number, "key": ..., ...}`, such as `trl-sipo data check` writes: these
            rows are left out. They are counted in the split as it is loaded, before `min_confidence`; the rows of a
            stream are told by their keys.

    Raises:
        DatasetError: nothing there, no such split (lists those there are), files that cannot be read, columns of
            unequal length, images without a partner.
    """
    if not isinstance(name_or_path, Mapping):
        folder = Path(name_or_path).expanduser()
        cache = find_cache(folder if name is None else folder / name, split)
        if cache is not None:
            _refuse_for_cache(streaming=streaming, min_confidence=min_confidence, skip_rows=skip_rows, format=format)
            return CachedPairs(cache)
    dataset = _load(name_or_path, name, split, streaming, media_folder)
    dataset = read_source(dataset, format)
    return dataset if skip_rows is min_confidence is None else _left(dataset, skip_rows, min_confidence)


def _left(
    dataset: Dataset | IterableDataset, skip_rows: str | os.PathLike[str] | None, min_confidence: float | None
) -> Dataset | IterableDataset:
    """The rows that are not left out."""
    if skip_rows is not None:
        dataset = without_rows(dataset, listed_rows(skip_rows))
    if min_confidence is not None:
        dataset = confident_pairs(dataset, min_confidence)
    logger.warning("From here on, errors count the rows that are left, from 0.")
    return dataset


def _refuse_for_cache(**options: Any) -> None:
    given = [f"{name}={value!r}" for name, value in options.items() if value]
    if given:
        raise DatasetError(
            f"{given[0]} does not apply to a cache, which is read as it was encoded. Give it to `trl-sipo encode`."
        )


def _load(
    name_or_path: str | os.PathLike[str] | Mapping[str, Sequence[Any]],
    name: str | None,
    split: str,
    streaming: bool,
    media_folder: str | os.PathLike[str] | None,
) -> Dataset | IterableDataset:
    """Rows as they are stored, with absolute paths."""
    if isinstance(name_or_path, Mapping):
        return _take_split(_single(lambda: dataset_from_columns(name_or_path), split, streaming), split, "the columns")
    text = os.path.expanduser(os.fspath(name_or_path))
    path = Path(text)
    if not os.path.exists(path):  # unlike the method, false of a path that is too long
        if _looks_like_path(text):
            raise DatasetError(f"there is no file or folder {text!r} (working directory: {os.getcwd()})")
        dataset = _load_from_hub(text, name, split, streaming)
        return with_absolute_paths(dataset, media_folders(Path.cwd(), media_folder=media_folder))
    if name is not None:
        path = path / name
        if not path.is_dir():
            raise DatasetError(f"name={name!r}: {text!r} is a local path and has no folder of that name")
    return _take_split(_local_splits(path, split, streaming, media_folder), split, repr(str(path)))


def dataset_from_columns(columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """A dataset from lists of equal length.

    Raises:
        DatasetError: the lengths differ, or there is no column.
    """
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise DatasetError(f"columns must exist and be of equal length, found {lengths}")
    try:
        return Dataset.from_dict(dict(columns))
    except (TypeError, ValueError, OverflowError, OSError) as error:  # pyarrow's errors are ValueError and TypeError
        raise DatasetError(f"the columns {list(columns)} cannot be read as a table: {error}") from error


def _single(loader: _Loader, split: str, streaming: bool) -> dict[str, _Loader]:
    """One table without a name of its own: it is whatever split is asked for."""
    return {_base_names(split)[0]: _maybe_streamed(loader, streaming)}


def _maybe_streamed(loader: _Loader, streaming: bool) -> _Loader:
    def load() -> Dataset | IterableDataset:
        dataset = loader()
        assert isinstance(dataset, Dataset)
        return dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), _MAX_STREAM_SHARDS)))

    return load if streaming else loader


def _local_splits(
    path: Path, split: str, streaming: bool, media_folder: str | os.PathLike[str] | None
) -> dict[str, _Loader]:
    """Split names and how to load each."""
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DatasetError(f"cannot read {str(path)!r}: expected one of {', '.join(_READERS)}")
        return {_base_names(split)[0]: lambda: _load_files([path], streaming, media_folder)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_splits(path, split, streaming, media_folder)
    roots = [path.resolve(), *([] if media_folder is None else media_folders(path, media_folder=media_folder))]

    def read(columns_of: Callable[[Path], dict[str, list[Any]]], folder: Path) -> Dataset | IterableDataset:
        return with_absolute_paths(dataset_from_columns(columns_of(folder)), roots)

    if is_video_dpo_folder(path):
        return _single(lambda: read(read_video_dpo_folder, path), split, streaming)
    folders = find_image_folders(path)
    if folders:
        if set(folders) == {""}:
            return _single(lambda: read(read_image_folder, path), split, streaming)
        return {
            name: _maybe_streamed(lambda folder=folder: read(read_image_folder, folder), streaming)
            for name, folder in folders.items()
        }
    files = _data_files(path)
    if not files:
        raise DatasetError(
            f"the folder {str(path)!r} holds no preference data: no {', '.join(_READERS)} file, no dataset of "
            "save_to_disk, and no folders 'chosen' and 'rejected'"
        )
    return {name: lambda group=group: _load_files(group, streaming, media_folder) for name, group in files.items()}


def _saved_splits(
    path: Path, split: str, streaming: bool, media_folder: str | os.PathLike[str] | None
) -> dict[str, _Loader]:
    try:
        _check_saved_files(path)
        saved = datasets.load_from_disk(str(path))
    except DatasetError:
        raise
    except Exception as error:  # of what its tables of contents hold, `datasets` checks nothing
        raise DatasetError(f"the saved dataset {str(path)!r} cannot be read: {error}") from error
    # Relative paths were seen from the folder in which the program ran that saved them: this one, as it may be.
    folders = media_folders(path.resolve(), media_folder=media_folder)
    folders += [Path.cwd()] * (media_folder is None)

    def read(part: Dataset) -> Dataset | IterableDataset:
        return with_absolute_paths(part.with_format(None), folders)  # the format is saved too, and may be any

    if isinstance(saved, DatasetDict):
        return {str(name): _maybe_streamed(lambda part=part: read(part), streaming) for name, part in saved.items()}
    return _single(lambda: read(saved), split, streaming)


def _check_saved_files(folder: Path) -> None:
    """Raise DatasetError where the tables of contents of a saved dataset name what is no file or folder within it."""
    parts = [folder]
    for split in _names_in(folder / "dataset_dict.json", lambda contents: contents["splits"]):
        parts.append(folder / split)
    for part in parts:
        for name in _names_in(part / "state.json", lambda state: [file["filename"] for file in state["_data_files"]]):
            if not (part / name).is_file():  # to open a pipe is to wait for it
                what = f"the saved dataset {str(part)!r} cannot be read"
                raise DatasetError(f"{what}: it names {name!r:.200}, which is no file; {_SAVE_ANEW}")


def _names_in(contents: Path, names_of: Callable[[Any], list[str]]) -> list[str]:
    names = names_of(json.loads(contents.read_text(encoding="utf-8"))) if contents.is_file() else []
    for name in names:
        if name in ("", "..") or Path(name).name != name:
            raise DatasetError(f"{str(contents)!r} names {name!r:.200}, which leads out of its folder: {_SAVE_ANEW}")
    return names


def _data_files(folder: Path) -> dict[str, list[Path]]:
    """Tables below a folder by split, in order of their paths. Hidden files and folders are left alone."""
    by_split: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or file.name in _NOT_DATA or file.suffix.lower() not in _READERS or not file.is_file():
            continue
        by_split.setdefault(_split_of(relative), []).append(file)
    for files in by_split.values():
        _warn_of_missing_shards(files)
    return by_split


def _warn_of_missing_shards(files: Sequence[Path]) -> None:
    """Say which shards of a numbered set are not there: some only may be meant, or a download was cut off."""
    found: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        shard = _SHARD.match(file.name)
        if shard:
            found.setdefault((file.parent, shard[1], int(shard[3])), set()).add(int(shard[2]))
    for (folder, name, total), numbers in found.items():
        missing = min(set(range(total)) - numbers, default=None)
        if missing is not None:
            first = f"{name}-{missing:05d}-of-{total:05d}"
            logger.warning("%s has %d of %d shards; %s is the first missing.", folder, len(numbers), total, first)


def _split_of(relative: Path) -> str:
    shard = _SHARD.match(relative.name)
    if shard:
        return shard[1]
    for part in (relative.stem, *reversed(relative.parts[:-1])):
        for word in re.split(r"[^a-zA-Z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _load_files(
    files: Sequence[Path], streaming: bool, media_folder: str | os.PathLike[str] | None
) -> Dataset | IterableDataset:
    """Read tables of one split, with relative paths of images and videos made absolute."""
    groups: dict[tuple[Path, str, bool], list[Path]] = {}
    for file in files:
        suffix = file.suffix.lower()
        is_list = suffix == ".json" and is_json_list(file)
        groups.setdefault((file.parent.resolve(), suffix, is_list), []).append(file)
    parts = []
    for (folder, suffix, is_list), group in groups.items():
        read = (_JSON_LIST if is_list else _READERS[suffix])[streaming]
        paths = [str(file) for file in group]
        patterns = [glob.escape(path) for path in paths] if suffix in _TAKE_PATTERNS and not is_list else paths
        try:
            check_text = None if is_list else _CHECKS.get(suffix)
            for file in group if check_text is not None else ():
                check_text(file)
            part = read(patterns, **_OPTIONS.get(suffix, {}))
            _check_cells(part, paths)
            parts.append(with_absolute_paths(part, media_folders(folder, group, media_folder)))
        except DatasetError as error:
            if any(path in str(error) for path in paths):
                raise
            raise DatasetError(f"{', '.join(paths[:3])}: {error}") from error
        except Exception as error:  # the readers raise their own errors, those of pyarrow and those of pandas
            cause = error.__cause__ or error
            if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):
                raise DatasetError(f"the dataset is empty: {', '.join(paths[:3])} holds no rows") from error
            raise DatasetError(f"cannot read {', '.join(paths[:3])}: {type(cause).__name__}: {cause}") from error
    return parts[0] if len(parts) == 1 else _concatenated(parts, [str(folder) for folder, *_ in groups])


def _concatenated(parts: list[Any], folders: list[str]) -> Dataset | IterableDataset:
    """The rows of all parts. Columns that some lack are not filled up: rows without their label would be dropped."""
    columns = [set(stream_columns(part) if isinstance(part, IterableDataset) else part.column_names) for part in parts]
    message = f"the tables in {folders} do not have the same columns"
    lacking = sorted(set.union(*columns) - set.intersection(*columns))
    if lacking:
        raise DatasetError(f"{message}: only some have {lacking}. Give one of the folders, or make the columns equal.")
    try:
        return datasets.concatenate_datasets([_plain_strings(part) for part in parts])
    except ValueError as error:
        raise DatasetError(f"{message}: {error}") from error


def _check_cells(part: Dataset | IterableDataset, paths: Sequence[str]) -> None:
    """Raise an error on what the readers take without a word.

    Texts that are no UTF-8; and lines of a CSV with more cells than the header, of which pandas takes the first for
    names of rows, so that all others slip into another column.
    """
    if isinstance(part, Dataset):
        for column, feature in part.features.items():
            if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
                try:
                    part.data.column(column).validate(full=True)
                except pa.ArrowInvalid as error:
                    files = ", ".join(paths[:3])
                    raise DatasetError(f"cannot read {files}: a text of {column!r} is no UTF-8 ({error})") from error
    if paths[0].lower().endswith(".csv"):
        columns = stream_columns(part) if isinstance(part, IterableDataset) else part.column_names
        if any(column.startswith("__index_level_") for column in columns):
            raise DatasetError(f"cannot read {', '.join(paths[:3])}: the lines have more cells than the header")


def _plain_strings(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The readers of CSV and JSON use different types of string, which do not concatenate."""
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Value) and feature.dtype == "large_string":
            dataset = dataset.cast_column(column, Value("string"))
    return dataset


def _take_split(splits: Mapping[str, _Loader], split: str, source: str) -> Dataset | IterableDataset:
    """Load the split that is asked for, of those there are, and cut the slice."""
    unknown = [base for base in _base_names(split) if base not in splits]
    if unknown:
        raise DatasetError(f"{source} has no split {unknown[0]!r}; it has {sorted(splits)}")
    if split in splits:
        return splits[split]()
    loaded = {base: splits[base]() for base in dict.fromkeys(_base_names(split))}
    if not all(isinstance(dataset, Dataset) for dataset in loaded.values()):
        raise DatasetError(f"split={split!r} cannot be cut from a stream; ask for a whole split of {sorted(splits)}")
    try:
        spec = ReadInstruction.from_spec(split).to_absolute({base: len(dataset) for base, dataset in loaded.items()})
    except (ValueError, AssertionError) as error:
        raise DatasetError(f"split={split!r} is no valid slice: {error}") from error
    parts = [loaded[part.splitname].select(range(part.from_, part.to)) for part in spec]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _base_names(split: str) -> list[str]:
    """The splits that a specification such as "train[:10%]+test" names."""
    names = [part.strip().split("[")[0] for part in split.split("+")]
    if not all(names):
        raise DatasetError(f"split={split!r} names no split")
    return names


def _looks_like_path(text: str) -> bool:
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None and not text.startswith(".")
    return not is_hub_id or Path(text).suffix.lower() in _READERS


def _load_from_hub(text: str, name: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(text, name, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise DatasetError(
            f"{text!r} is neither a local path (working directory: {os.getcwd()}) nor a dataset on the hub that "
            f"can be reached: {error}"
        ) from error
    except ValueError as error:  # no such split or configuration; the message lists those there are
        raise DatasetError(f"cannot load {text!r} (name={name!r}, split={split!r}) from the hub: {error}") from error
