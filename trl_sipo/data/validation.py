# SPDX-License-Identifier: Apache-2.0
"""What can be known to be wrong with preference data is said before any long work."""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from trl_sipo.data.formats import (
    PreferenceFormat,
    RowSelection,
    detect_format,
    read_prompt,
    refuse_custom_transform,
    select_pairs,
    undecoded,
)
from trl_sipo.data.images import looks_like_text, verify_image
from trl_sipo.data.preference_dataset import read_latents, stream_columns
from trl_sipo.errors import DatasetError

logger = logging.getLogger(__name__)

_NUM_NAMED = 5  # problems that an error names
_NUM_STREAMED = 8  # rows of a stream that are looked at: what is read here is read again for training
_BATCH = 10_000
_NUM_SILENT = 500  # rows that are opened without a progress bar


def check_preference_dataset(
    dataset: Dataset | IterableDataset,
    fmt: PreferenceFormat | None = None,
    *,
    num_checked_images: int = 2000,
) -> dict[str, Any]:
    """Check preference data, and count what is in it.

    All rows: labels in range. All pairs: prompts that are text and not empty; images that are there and not empty
    (bytes, or a path to a file), without opening them. `num_checked_images` pairs, evenly spaced, are opened for good:
    both images verified and decoded. So a set of no more pairs than that is known to be whole, and of a larger one
    only those are: in the others an image can still be broken, which ends the training run that comes to it. Of a
    stream, only the first few rows can be looked at.

    Args:
        dataset: the rows, ties included.
        fmt: its format; None: from its columns.
        num_checked_images: how many pairs have both arms opened; all when there are fewer. Some 400 pairs of JPEG a
            second at 512 px, and 70 of PNG; a progress bar is shown from a few hundred on.

    Returns:
        `format`, `num_rows`, `num_ties`, `num_unlabelled`, `num_swapped` (pairs whose second column is preferred),
        `num_pairs`, `num_checked`, and of those checked `num_identical_arms`, `num_unequal_sizes` and `smallest_side`
        (pixels; None for latents). For a stream, the number of rows, ties, unlabelled and pairs are of the rows looked
        at, and `streaming` is True.

    Raises:
        DatasetError: with the rows concerned and what to do.
    """
    if num_checked_images < 0:
        raise DatasetError(f"num_checked_images must not be negative, found {num_checked_images}")
    if isinstance(dataset, IterableDataset):
        return _check_stream(dataset, fmt or detect_format(stream_columns(dataset)), num_checked_images)
    refuse_custom_transform(dataset)
    fmt = fmt or detect_format(dataset.column_names)
    if len(dataset) == 0:
        raise DatasetError("the dataset is empty: it has no rows")
    selection = select_pairs(dataset, fmt)
    _refuse_nothing_left(selection, len(dataset))
    rows = undecoded(dataset, fmt)
    _check_prompts(rows, fmt, selection.kept)
    if not fmt.holds_latents:
        _check_stored_images(rows, fmt, selection.kept)
    checked = selection.kept[_evenly_spaced(len(selection.kept), num_checked_images)]
    report = {
        "format": fmt.name,
        "streaming": False,
        "num_rows": len(dataset),
        "num_ties": selection.num_ties,
        "num_unlabelled": selection.num_unlabelled,
        "num_swapped": selection.num_swapped,
        "num_pairs": len(selection.kept),
        **_check_arms(((int(row), rows[int(row)]) for row in _with_progress(checked)), fmt),
    }
    _warn(report, fmt)
    return report


def _refuse_nothing_left(selection: RowSelection, num_rows: int) -> None:
    if len(selection.kept) == 0:
        raise DatasetError(
            f"no pair is left to learn from: of {num_rows} rows {selection.num_ties} are ties (label 0.5) and "
            f"{selection.num_unlabelled} have no label"
        )


def _check_stream(dataset: IterableDataset, fmt: PreferenceFormat, num_checked_images: int) -> dict[str, Any]:
    rows = list(enumerate(itertools.islice(undecoded(dataset, fmt), min(num_checked_images, _NUM_STREAMED))))
    if not rows and num_checked_images:
        raise DatasetError("the dataset is empty: the stream has no rows")
    unlabelled = {number for number, row in rows if fmt.is_unlabelled(row)}
    ties = {number for number, row in rows if fmt.is_tie(row, where=f"row {number}")}
    pairs = [(number, row) for number, row in rows if number not in unlabelled | ties]
    report = {
        "format": fmt.name,
        "streaming": True,
        "num_rows": len(rows),
        "num_ties": len(ties),
        "num_unlabelled": len(unlabelled),
        "num_swapped": sum(fmt.is_swapped(row) for _, row in pairs),
        "num_pairs": len(pairs),
        **_check_arms(iter(pairs), fmt),
    }
    _warn(report, fmt)
    return report


def _evenly_spaced(length: int, count: int) -> np.ndarray:
    if count >= length:
        return np.arange(length)
    return np.linspace(0, length - 1, count).round().astype(np.int64)


def _check_prompts(rows: Dataset, fmt: PreferenceFormat, kept: np.ndarray) -> None:
    problems = []
    for number, prompt in _column_values(rows, fmt.prompt, kept):
        try:
            read_prompt(prompt, where=f"row {number}, column {fmt.prompt!r}")
        except DatasetError as error:
            problems.append(str(error))
    _raise_all(problems, "Remove such rows with dataset.filter(...).")


def _check_stored_images(rows: Dataset, fmt: PreferenceFormat, kept: np.ndarray) -> None:
    """Images that are missing or empty, from the lengths of the stored bytes and the sizes of files alone."""
    problems = []
    for column in (fmt.first, fmt.second):
        found = _stored_images(rows, column)
        if found is None:
            continue
        num_bytes, paths = found
        where = "row {}, column " + repr(column)
        for number in kept[num_bytes[kept] == 0].tolist():
            problems.append(f"{where.format(number)}: the image is empty (0 bytes)")
        for number in kept[num_bytes[kept] < 0].tolist():
            problem = _path_problem(paths[number].as_py())
            if problem:
                problems.append(f"{where.format(number)}: {problem}")
    _raise_all(problems, "Relative paths are relative to the folder in which this process was started.")


def _stored_images(rows: Dataset, column: str) -> tuple[np.ndarray, pa.ChunkedArray] | None:
    """Per row, the number of stored bytes (-1: none) and the path; None for a column of another kind.

    From the whole Arrow column: lengths come from its offsets, so that no image is read from the disk or copied, as a
    selection of rows would.
    """
    table = rows.data.table.select([column])
    if rows._indices is not None:  # rows that were selected or shuffled; there is no public name for it
        positions = rows._indices.column(0).to_numpy()
    else:
        positions = np.arange(len(rows))
    values = table[column]
    if pa.types.is_struct(values.type) and {"bytes", "path"} <= {child.name for child in values.type}:
        stored, paths = pc.struct_field(values, "bytes"), pc.struct_field(values, "path")
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        stored, paths = None, values
    elif pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        stored, paths = values, pa.chunked_array([pa.nulls(len(values), pa.string())])
    else:
        return None
    num_bytes = np.full(len(values), -1, dtype=np.int64)
    if stored is not None:
        num_bytes = pc.fill_null(pc.binary_length(stored).cast(pa.int64()), -1).to_numpy()
    return num_bytes[positions], paths.take(pa.array(positions)).combine_chunks()


def _path_problem(path: str | None) -> str | None:
    if path is None:
        return "the image is missing (null)"
    if os.path.isfile(path):
        return f"the file {path!r} is empty (0 bytes)" if os.path.getsize(path) == 0 else None
    return None if looks_like_text(path) else f"there is no file {path!r}"  # opening says more of a text


def _with_progress(checked: np.ndarray) -> Iterator[int]:
    is_quiet = len(checked) <= _NUM_SILENT or os.environ.get("LOCAL_RANK", "0") != "0"
    return iter(tqdm(checked, desc="Checking images", unit="pair", disable=is_quiet, leave=False))


def _column_values(rows: Dataset, column: str, kept: np.ndarray) -> Iterator[tuple[int, Any]]:
    """(row number, value) of the kept rows of one column, without reading the others."""
    is_kept = np.zeros(len(rows), dtype=bool)
    is_kept[kept] = True
    start = 0
    for batch in rows.select_columns([column]).iter(batch_size=_BATCH):
        for offset, value in enumerate(batch[column]):
            if is_kept[start + offset]:
                yield start + offset, value
        start += len(batch[column])


def _check_arms(rows: Iterator[tuple[int, Mapping[str, Any]]], fmt: PreferenceFormat) -> dict[str, Any]:
    """Open both arms of each row."""
    num_checked = num_identical = num_unequal = 0
    smallest_side: int | None = None
    problems = []
    for number, row in rows:
        try:
            pair = fmt.read(row, where=f"row {number}")
            identical, unequal, side = _latent_arms(pair, number) if fmt.holds_latents else _image_arms(pair, number)
        except DatasetError as error:
            problems.append(str(error))
            continue
        num_checked += 1
        num_identical += identical
        num_unequal += unequal
        smallest_side = side if smallest_side is None or side is None else min(side, smallest_side)
    _raise_all(problems, "")
    return {
        "num_checked": num_checked,
        "num_identical_arms": num_identical,
        "num_unequal_sizes": num_unequal,
        "smallest_side": smallest_side,
    }


def _latent_arms(pair: Mapping[str, Any], number: int) -> tuple[bool, bool, None]:
    latents = read_latents(pair, where=f"row {number}")
    return bool((latents["chosen_latents"] == latents["rejected_latents"]).all()), False, None


def _image_arms(pair: Mapping[str, Any], number: int) -> tuple[bool, bool, int]:
    chosen = verify_image(pair["chosen"], where=f"row {number}, the chosen image")
    rejected = verify_image(pair["rejected"], where=f"row {number}, the rejected image")
    unequal = chosen.size != rejected.size
    identical = not unequal and chosen.tobytes() == rejected.tobytes()
    return identical, unequal, min(*chosen.size, *rejected.size)


def _raise_all(problems: Sequence[str], advice: str) -> None:
    if not problems:
        return
    more = f"\n  ... and {len(problems) - _NUM_NAMED} more" if len(problems) > _NUM_NAMED else ""
    lines = "".join(f"\n  {problem}" for problem in problems[:_NUM_NAMED])
    raise DatasetError(f"{len(problems)} problem(s) in the preference data:{lines}{more}\n{advice}".rstrip())


def _warn(report: Mapping[str, Any], fmt: PreferenceFormat) -> None:
    if report["num_identical_arms"]:
        logger.warning(
            "%d of %d checked pairs have the same picture as chosen and rejected; they teach nothing.",
            report["num_identical_arms"],
            report["num_checked"],
        )
    if report["num_swapped"] and fmt.first.startswith("chosen"):
        logger.warning(
            "In %d of %d pairs the column %r is below 0.5, so that %r is taken as the rejected one: the column is "
            "read as the share of votes for %r. If it means something else, drop it: dataset.remove_columns(%r).",
            report["num_swapped"],
            report["num_pairs"],
            fmt.label,
            fmt.first,
            fmt.first,
            fmt.label,
        )
