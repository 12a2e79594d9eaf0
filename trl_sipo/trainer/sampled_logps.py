# SPDX-License-Identifier: Apache-2.0
"""Recorded log-probabilities of completions under the policy that wrote them: two columns of text preference data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from trl_sipo.errors import DatasetError

# Of the sum over the tokens of the completion, its end-of-sequence token among them.
SAMPLED_COLUMNS = ("chosen_logps", "rejected_logps")


def uses_recorded(dataset: Dataset | IterableDataset | None, sampling_policy: str) -> bool:
    """Whether weights are relative to the recorded log-probabilities of the training data.

    Args:
        dataset: The training data.
        sampling_policy: Of the configuration.

    Raises:
        DatasetError: Recorded ones are asked for and not there, or one column of the two is there alone.
    """
    if sampling_policy == "reference" or dataset is None:
        return False
    there = [name for name in SAMPLED_COLUMNS if name in _columns(dataset)]
    if len(there) == 1:
        raise DatasetError(
            f"The data has the column {there[0]!r} without its counterpart; {list(SAMPLED_COLUMNS)} belong together. "
            "Add the other one, or set `sampling_policy='reference'` to use neither."
        )
    if not there and sampling_policy == "recorded":
        raise DatasetError(
            f"`sampling_policy='recorded'` needs the columns {list(SAMPLED_COLUMNS)}, and the data has "
            f"{sorted(_columns(dataset))}. Add them, or set `sampling_policy='reference'`."
        )
    return bool(there)


def check_recorded(
    dataset: Dataset | IterableDataset, max_length: int | None, dataset_name: str
) -> Dataset | IterableDataset:
    """Tokenized data with checked columns of floats; a stream is checked as it is read.

    Args:
        dataset: With `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length: Longer sequences are truncated by the collator.
        dataset_name: For messages.

    Raises:
        DatasetError: A column is missing; a value is no log-probability; a completion is truncated, so that the
            policy's sum is over fewer tokens than the recorded one.
    """
    missing = [name for name in SAMPLED_COLUMNS if name not in _columns(dataset)]
    if missing:
        raise DatasetError(
            f"The {dataset_name} data lacks {missing}, which the training data has. Add them, or set "
            "`sampling_policy='reference'`."
        )
    return dataset.map(_checked_row, with_indices=True, fn_kwargs={"max_length": max_length, "where": dataset_name})


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    return list(dataset.column_names or next(iter(dataset)))


def _checked_row(row: dict[str, Any], index: int, max_length: int | None, where: str) -> dict[str, float]:
    values = {}
    for arm, name in zip(("chosen", "rejected"), SAMPLED_COLUMNS, strict=True):
        value = row[name]
        if not isinstance(value, int | float) or not -math.inf < value <= 0:
            raise DatasetError(
                f"Row {index} of the {where} data has {name}={value!r:.40}: it must be a finite number of at most 0, "
                "the sum of the log-probabilities of the completion's tokens."
            )
        length = len(row["prompt_ids"]) + len(row[f"{arm}_ids"])
        if max_length is not None and length > max_length:
            raise DatasetError(
                f"Row {index} of the {where} data has {length} tokens with its {arm} completion, which "
                f"`max_length={max_length}` truncates, but its {name} is of the whole completion. Raise `max_length`, "
                "or leave such rows out."
            )
        values[name] = float(value)
    return values


@dataclass
class RecordedCollator:
    """Adds the recorded columns to what another collator makes of the rows: (batch,) float32 each."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        recorded = {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in SAMPLED_COLUMNS}
        return {**self.collate(rows), **recorded}


def without_recorded(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch as TRL knows it."""
    return {name: value for name, value in inputs.items() if name not in SAMPLED_COLUMNS}
