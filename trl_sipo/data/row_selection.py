# SPDX-License-Identifier: Apache-2.0
"""Leave rows out, by number or by how certain their label is, and say so."""

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset

from trl_sipo.data.formats import PreferenceFormat, detect_format, label_values
from trl_sipo.data.preference_dataset import stream_columns
from trl_sipo.errors import ConfigurationError, DatasetError

logger = logging.getLogger(__name__)


def listed_rows(file: str | os.PathLike[str]) -> list[int]:
    """The row numbers of a JSON Lines file of `{"row": number, ...}`, ascending, each once.

    Raises:
        DatasetError: no such file, or a line of another form.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"skip_rows={str(file)!r} cannot be read: {error}") from error
    rows = set()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)["row"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DatasetError(f'{file}, line {number}: expected {{"row": number, ...}}, found {line:.80}') from error
        if not isinstance(row, int) or isinstance(row, bool) or row < 0:
            raise DatasetError(f"{file}, line {number}: a row is a number from 0, found {row!r}")
        rows.add(row)
    return sorted(rows)


def without_rows(dataset: Dataset | IterableDataset, rows: Collection[int]) -> Dataset | IterableDataset:
    """The dataset without some rows, named by their position.

    Raises:
        DatasetError: a row beyond the end, so that the list must be of other data; of a stream the end is not known.
    """
    if not rows:
        return dataset
    skipped = frozenset(rows)
    logger.warning("Leaving out %d rows that are listed to be skipped.", len(skipped))
    if isinstance(dataset, IterableDataset):
        return dataset.filter(lambda _, number: number not in skipped, with_indices=True)
    if max(skipped) >= len(dataset):
        raise DatasetError(
            f"row {max(skipped)} is to be skipped, but the dataset has {len(dataset)} rows: the list is of another one"
        )
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), sorted(skipped)))


def confident_pairs(dataset: Dataset | IterableDataset, minimum: float) -> Dataset | IterableDataset:
    """The rows in which at least this share of the votes, or this probability, is on one side.

    Raises:
        ConfigurationError: a share outside [0.5, 1], or a dataset without labels.
    """
    if not 0.5 <= minimum <= 1:
        raise ConfigurationError(f"`min_confidence` is a share of votes for one side, in [0.5, 1]; got {minimum}.")
    is_stream = isinstance(dataset, IterableDataset)
    fmt = detect_format(stream_columns(dataset) if is_stream else dataset.column_names)
    if fmt.label is None:
        raise ConfigurationError(f"`min_confidence={minimum}` needs labels, but the dataset has none. Remove it.")
    if is_stream:
        return dataset.filter(
            lambda label: label is not None and max(label, 1 - label) >= minimum, input_columns=[fmt.label]
        )
    kept = _confident_rows(dataset, fmt, minimum)
    logger.warning("Leaving out %d of %d rows below min_confidence.", len(dataset) - len(kept), len(dataset))
    return dataset.select(kept)


def _confident_rows(dataset: Dataset, fmt: PreferenceFormat, minimum: float) -> np.ndarray:
    labels = label_values(dataset, fmt)
    return np.flatnonzero(np.maximum(labels, 1 - labels) >= minimum)  # NaN, a row without a label, is left out
