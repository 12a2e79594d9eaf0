# SPDX-License-Identifier: Apache-2.0
"""Leave rows out, those of a list or those whose label is uncertain, and say so."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, IterableDataset

from trl_sipo.data.formats import PreferenceFormat, detect_format, label_values, undecoded
from trl_sipo.data.preference_dataset import stream_columns
from trl_sipo.data.stored import path_name, stored_value
from trl_sipo.errors import ConfigurationError, DatasetError

logger = logging.getLogger(__name__)


def row_key(fmt: PreferenceFormat, row: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that tell a row by what is stored in it, without reading files.

    Of paths, the names of the file and of its folder count.

    A stream has no row numbers that the workers of a data loader agree on, and a number alone would not tell that a
    list belongs to other data.
    """
    digest = hashlib.blake2b(digest_size=8)
    for column in fmt.columns:
        parts = _stored_parts(row[column]) if column in fmt.media_columns else [_text(row[column])]
        for part in parts:
            digest.update(len(part).to_bytes(8, "big"))  # so that parts cannot run into each other
            digest.update(part)
    return digest.hexdigest()


def _stored_parts(value: Any) -> Iterator[bytes]:
    """What is stored of an image, a video or latents; a folder may have moved, so of a path only the last names."""
    value = stored_value(value)
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, str | os.PathLike):
        yield _text(path_name(value))
    elif isinstance(value, PIL.Image.Image):  # of a stream that was made in the process
        yield repr(value.size).encode()
        yield value.tobytes()
    elif isinstance(value, list | tuple) and value and isinstance(value[0], str | bytes | Mapping | PIL.Image.Image):
        for part in value:
            yield from _stored_parts(part)
    else:  # of an array, all numbers: its own text leaves out those in the middle
        yield _text(value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value)


def _text(value: Any) -> bytes:
    """Numbers as floats: what is 1 in one chunk of a table may be 1.0 in another."""
    is_float = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    value = float(value) if is_float else value
    return (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")


def listed_rows(file: str | os.PathLike[str]) -> dict[int, str | None]:
    """The rows of a JSON Lines file of `{"row": number, "key": row_key, ...}`: number to key, None without one.

    Raises:
        DatasetError: no such file, or a line of another form.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"skip_rows={str(file)!r} cannot be read: {error}") from error
    rows: dict[int, str | None] = {}
    for number, line in enumerate(lines, start=1):
        try:
            listed = json.loads(line)
            row, key = listed["row"], listed.get("key")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DatasetError(f'{file}, line {number}: expected {{"row": number, ...}}, found {line:.80}') from error
        if not isinstance(row, int) or isinstance(row, bool) or row < 0:
            raise DatasetError(f"{file}, line {number}: a row is a number from 0, found {row!r:.80}")
        if not isinstance(key, str | None):
            raise DatasetError(f"{file}, line {number}: a key is a text, found {key!r:.80}")
        rows[row] = key
    return rows


def without_rows(dataset: Dataset | IterableDataset, listed: Mapping[int, str | None]) -> Dataset | IterableDataset:
    """The dataset without some rows: of a stream those of the listed keys, of other data those of the listed numbers.

    Raises:
        DatasetError: a number beyond the end, or a row that is not of the listed key: the list is of other data.
        ConfigurationError: a stream, and a row that is listed without a key.
    """
    if not listed:
        return dataset
    if isinstance(dataset, IterableDataset):
        return _stream_without_rows(dataset, listed)
    return dataset.select(_unlisted_rows(dataset, listed))


def remaining_rows(
    dataset: Dataset, skip_rows: str | os.PathLike[str] | None, min_confidence: float | None
) -> np.ndarray:
    """The numbers of the rows that `without_rows` and, of what is left, `confident_pairs` leave.

    Raises:
        DatasetError: a list that cannot be read, or is of other data.
        ConfigurationError: a share outside [0.5, 1], or a dataset without labels.
    """
    listed = {} if skip_rows is None else listed_rows(skip_rows)
    numbers = _unlisted_rows(dataset, listed) if listed else np.arange(len(dataset))
    return numbers if min_confidence is None else numbers[_confident_rows(dataset.select(numbers), min_confidence)]


def _unlisted_rows(dataset: Dataset, listed: Mapping[int, str | None]) -> np.ndarray:
    fmt = detect_format(dataset.column_names, arms=None)
    rows = undecoded(dataset, fmt)
    for number, key in listed.items():
        if number >= len(dataset):
            reason = f"the dataset has {len(dataset)} rows"
        elif key is not None and row_key(fmt, rows[number]) != key:
            reason = "another row stands there"
        else:
            continue
        raise DatasetError(
            f"row {number} is to be skipped, but {reason}: the list is of other data, or of another split or format. "
            "Make a new one: trl-sipo data check."
        )
    logger.warning("Leaving out %d of %d rows, as listed.", len(listed), len(dataset))
    return np.setdiff1d(np.arange(len(dataset)), list(listed))


def _stream_without_rows(dataset: IterableDataset, listed: Mapping[int, str | None]) -> IterableDataset:
    keys = frozenset(listed.values())
    if None in keys:
        raise ConfigurationError(
            "`skip_rows` lists rows without their keys, which alone tell the rows of a stream. Take a list that has "
            "them, such as the `bad_rows.jsonl` of `trl-sipo data check`, or read the data without streaming."
        )
    fmt = detect_format(stream_columns(dataset), arms=None)
    logger.warning("Leaving out the %d rows of a stream that are listed.", len(listed))
    return undecoded(dataset, fmt).filter(lambda row: row_key(fmt, row) not in keys)


def confident_pairs(dataset: Dataset | IterableDataset, minimum: float) -> Dataset | IterableDataset:
    """The rows in which at least this share of the votes, or this probability, is on one side.

    Raises:
        ConfigurationError: a share outside [0.5, 1], or a dataset without labels.
    """
    if not isinstance(dataset, IterableDataset):
        return dataset.select(_confident_rows(dataset, minimum))
    label = _label_column(stream_columns(dataset), minimum)
    return dataset.filter(lambda value: value is not None and max(value, 1 - value) >= minimum, input_columns=[label])


def _confident_rows(dataset: Dataset, minimum: float) -> np.ndarray:
    _label_column(dataset.column_names, minimum)
    labels = label_values(dataset, detect_format(dataset.column_names, arms=None))
    kept = np.flatnonzero(np.maximum(labels, 1 - labels) >= minimum)  # NaN, a row without a label, is left out
    logger.warning("Leaving out %d of %d rows below min_confidence.", len(dataset) - len(kept), len(dataset))
    return kept


def _label_column(columns: list[str], minimum: float) -> str:
    """Which column has the labels that a smallest confidence is held against."""
    if not 0.5 <= minimum <= 1:
        raise ConfigurationError(f"`min_confidence` is a share of votes for one side, in [0.5, 1]; got {minimum}.")
    label = detect_format(columns, arms=None).label
    if label is None:
        raise ConfigurationError(f"`min_confidence={minimum}` needs labels, but the dataset has none. Remove it.")
    return label
