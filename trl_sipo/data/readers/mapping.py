# SPDX-License-Identifier: Apache-2.0
"""Apply a pure function of one record to all rows, of a dataset or of a stream."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from trl_sipo.data.preference_dataset import stream_columns
from trl_sipo.errors import DatasetError

Record = Mapping[str, Any]
PAIR_FEATURES = Features(
    {"prompt": Value("string"), "chosen": Value("string"), "rejected": Value("string"), "label": Value("float64")}
)


def expanded(
    dataset: Dataset | IterableDataset, pairs_of: Callable[[Record], list[dict[str, Any]]]
) -> Dataset | IterableDataset:
    """The pairs of every record, one after the other; other columns are left out.

    Args:
        pairs_of: from a record to rows of `PAIR_FEATURES`, whose arms are paths.

    Raises:
        DatasetError: from `pairs_of`, with the record's number where it is known.
    """
    columns = stream_columns(dataset) if isinstance(dataset, IterableDataset) else dataset.column_names

    def expand(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        pairs = []
        for position, number in enumerate(numbers):
            try:
                pairs.extend(map(_checked, pairs_of({column: batch[column][position] for column in batch})))
            except DatasetError as error:
                raise DatasetError(f"record {number}: {error}") from error
        return {column: [pair[column] for pair in pairs] for column in PAIR_FEATURES}

    return dataset.map(expand, batched=True, with_indices=True, remove_columns=columns, features=PAIR_FEATURES)


def _checked(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair whose arms are paths, or null, which is refused with its row."""
    for arm in ("chosen", "rejected"):
        if not isinstance(pair[arm], str | None):
            raise DatasetError(f"expected a path, found {type(pair[arm]).__name__} {pair[arm]!r:.80}")
    return pair


def with_number(
    dataset: Dataset | IterableDataset,
    name: str,
    columns: tuple[str, ...],
    number_of: Callable[..., float | None],
) -> Dataset | IterableDataset:
    """Add, or replace, a column of floats that follows from other columns. Images are neither read nor copied.

    Args:
        name: of the new column.
        columns: whose values `number_of` takes, in order.
        number_of: gives a float, or None for null.
    """
    if isinstance(dataset, IterableDataset):
        # The types of a stream may not be known; where they are, a text that becomes a number changes its type.
        features = None if dataset.features is None else Features({**dataset.features, name: Value("float64")})
        return dataset.map(lambda *values: {name: number_of(*values)}, input_columns=list(columns), features=features)
    values = dataset.select_columns(list(columns)).with_format(None)
    numbers = [number_of(*row) for row in zip(*(values[column][:] for column in columns), strict=True)]
    others = dataset.remove_columns(name) if name in dataset.column_names else dataset
    return others.add_column(name, numbers, feature=Value("float64"))
