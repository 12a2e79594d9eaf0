# SPDX-License-Identifier: Apache-2.0
"""Published preference datasets whose records are not yet pairs: one module each, and how their columns tell them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from trl_sipo.data.formats import FORMATS, PAIRS
from trl_sipo.data.preference_dataset import stream_columns
from trl_sipo.data.readers.hpdv2 import choice_pairs, ranking_pairs
from trl_sipo.data.readers.hpdv3 import confidence_pair
from trl_sipo.data.readers.mapping import expanded, with_number
from trl_sipo.data.readers.pick_a_pic_webdataset import COLUMN_NAMES, label_of_text
from trl_sipo.data.readers.rapidata import VOTES, vote_share
from trl_sipo.errors import DatasetError


@dataclass(frozen=True)
class Reader:
    """A source, and how it becomes a layout of `trl_sipo.data.formats.FORMATS`.

    Args:
        columns: those by which it is recognised.
        read: from its rows to rows of a known layout.
        paths: columns that hold paths of images, which may be relative to the table.
    """

    columns: tuple[str, ...]
    read: Callable[[Any], Any]
    paths: tuple[str, ...] = ()


def _votes_reader(arms: tuple[str, str], votes: tuple[str, str]) -> Reader:
    """Of a table whose two columns of votes, or of shares of votes, become a label."""
    return Reader(("prompt", *arms, *votes), lambda rows: with_number(rows, "label", votes, vote_share), arms)


READERS: dict[str, Reader] = {
    "hpdv2": Reader(
        ("prompt", "file_path", "human_preference"), lambda rows: expanded(rows, choice_pairs), ("file_path",)
    ),
    "hpdv2_ranking": Reader(
        ("prompt", "image_path", "rank"), lambda rows: expanded(rows, ranking_pairs), ("image_path",)
    ),
    "hpdv3": Reader(("prompt", "path1", "path2"), lambda rows: expanded(rows, confidence_pair), ("path1", "path2")),
    **{name: _votes_reader(*columns) for name, columns in VOTES.items()},
    "pick_a_pic_webdataset": Reader(
        tuple(COLUMN_NAMES),
        lambda rows: with_number(rows.rename_columns(COLUMN_NAMES), "label_0", ("label_0",), label_of_text),
    ),
}


def read_source(dataset: Dataset | IterableDataset, name: str | None = None) -> Dataset | IterableDataset:
    """Rows of any known source as rows of a layout of `FORMATS`; such rows themselves stay as they are.

    Args:
        dataset: from wherever.
        name: a key of `READERS` or `FORMATS`, where the columns would fit several; None: by the columns.

    Raises:
        DatasetError: no such name, columns that are not of it, or columns that fit several sources.
    """
    columns = stream_columns(dataset) if isinstance(dataset, IterableDataset) else dataset.column_names
    if name is None:
        return _read_recognised(dataset, set(columns))
    if name not in {*READERS, *FORMATS}:
        known = ", ".join(sorted({*READERS, *FORMATS}))
        raise DatasetError(f"unknown format {name!r} of a dataset; known are {known}")
    if name in READERS and set(READERS[name].columns) <= set(columns):
        return READERS[name].read(dataset)
    expected = FORMATS[name].required_columns if name in FORMATS else READERS[name].columns
    missing = [column for column in expected if column not in columns]
    if missing:
        raise DatasetError(f"the dataset is not of the format {name!r}: {missing} missing, columns found: {columns}")
    others = {column for fmt in FORMATS.values() for column in fmt.required_columns} - set(FORMATS[name].columns)
    return dataset.remove_columns([column for column in columns if column in others])


def _read_recognised(dataset: Dataset | IterableDataset, columns: set[str]) -> Dataset | IterableDataset:
    if any(set(fmt.required_columns) <= columns for fmt in PAIRS.values()):
        return dataset
    fitting = [name for name, reader in READERS.items() if set(reader.columns) <= columns]
    if len(fitting) > 1:
        raise DatasetError(
            f"the columns {sorted(columns)} fit the formats {fitting}; name one: `--dataset_format`, or "
            "`format` of load_preference_dataset"
        )
    # What fits none is refused where the columns are needed, with a list of those known.
    return READERS[fitting[0]].read(dataset) if fitting else dataset
