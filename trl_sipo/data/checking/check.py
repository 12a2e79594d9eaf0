# SPDX-License-Identifier: Apache-2.0
"""Look at every row of preference data: counts, lists of rows, label noise, and some pairs to look at."""

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trl_sipo.data.checking.features import FEATURES
from trl_sipo.data.checking.judgements import Count, Judgements, Repeats, find_repeats, find_triples
from trl_sipo.data.checking.noise import noise_report, share
from trl_sipo.data.checking.rows import CheckedRow, RowCheck, is_of_videos, text_hash
from trl_sipo.data.formats import TIE, PreferenceFormat, detect_format, undecoded
from trl_sipo.data.preference_dataset import first_row, stream_columns, stream_rows
from trl_sipo.data.video import ClipSampler
from trl_sipo.errors import DatasetError

_NUM_COMMON = 8  # sizes, lengths and rates that the report names
_QUANTILES = {"shortest": 0.0, "median": 0.5, "longest": 1.0}


@dataclass(frozen=True)
class CheckOptions:
    """What is looked at, and how closely.

    Args:
        limit: rows; None: all.
        num_frames: what clips need; None: as many as there are. 2 or more: the arms are videos.
        frame_rate: of the clips; None: the videos' own.
        decode_videos: every frame of every video; False: the index of frames and the first one.
        num_shown: pairs to look at.
        measure_features: note what no preference should hang on, such as brightness (`features.FEATURES`).
        num_workers: processes; a stream is read in this one alone.
        show_progress: a bar.
    """

    limit: int | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    decode_videos: bool = False
    num_shown: int = 24
    measure_features: bool = False
    num_workers: int = 0
    show_progress: bool = True


class Listed(NamedTuple):
    """A row of a list: its number, its key (None where rows of one content are meant to stay), and why it is there."""

    row: int
    key: str | None
    reason: str


@dataclass(frozen=True)
class ListedRows:
    """Rows with one reason, as arrays, since there may be millions.

    Args:
        rows: int64 numbers.
        keys: uint64; None: without keys.
        reason: of all.
    """

    rows: np.ndarray
    keys: np.ndarray | None
    reason: str

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Listed]:
        for position, row in enumerate(self.rows.tolist()):
            yield Listed(row, None if self.keys is None else f"{int(self.keys[position]):016x}", self.reason)


@dataclass
class DataCheck:
    """What was found.

    Attributes:
        report: counts and statistics, as JSON takes them.
        listed: name of a list to its rows and the reason of each; `bad_rows` are those that cannot be trained on.
        shown: some rows, with thumbnails.
        judgements: of the rows that open, as hashes.
        keys: (rows that open,) uint64.
        features: (rows that open, 2, features) float64, where they were measured.
    """

    report: dict[str, Any]
    listed: dict[str, list[Listed] | ListedRows]
    shown: list[CheckedRow]
    judgements: Judgements
    keys: np.ndarray
    features: np.ndarray | None = None

    def write(self, folder: Path) -> list[Path]:
        """`report.json`, and one JSON Lines file of `{"row", "key", "reason"}` for each list that is not empty."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "report.json"]
        paths[0].write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")
        for name, rows in self.listed.items():
            path = folder / f"{name}.jsonl"
            path.unlink(missing_ok=True)  # of an earlier check
            if rows:
                with path.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row._asdict()) + "\n" for row in rows)
                paths.append(path)
        return paths


def check_data(dataset: Dataset | IterableDataset, options: CheckOptions | None = None) -> DataCheck:
    """Look at every row, in order, keeping numbers and hashes of it only: memory does not grow with the media.

    Raises:
        DatasetError: columns of no known format, no rows, or a cache of encoded pairs.
    """
    options = options or CheckOptions()
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DatasetError(
            f"a {type(dataset).__name__} was checked when it was made: give the data that it is made of"
        )
    is_stream = isinstance(dataset, IterableDataset)
    fmt = detect_format(stream_columns(dataset) if is_stream else dataset.column_names)
    num_rows = None if is_stream else min(len(dataset), options.limit or len(dataset))
    if num_rows == 0:
        raise DatasetError("the dataset is empty: it has no rows")
    rows = undecoded(dataset, fmt)
    is_measured = options.measure_features and not fmt.holds_latents
    check = RowCheck(fmt, _videos(rows, fmt, options), options.decode_videos, is_measured)
    found = _Findings()
    for checked in tqdm(
        _checked(rows, check, num_rows, options), total=num_rows, unit="row", disable=not options.show_progress
    ):
        found.add(checked)
    return _summary(found, fmt, check)


def _videos(rows: Dataset | IterableDataset, fmt: PreferenceFormat, options: CheckOptions) -> ClipSampler | None:
    if fmt.holds_latents:
        return None
    if options.num_frames is None:
        row = first_row(rows) if isinstance(rows, IterableDataset) else rows[0]
        is_video = any(is_of_videos(row[column]) for column in fmt.media_columns)
    else:
        is_video = options.num_frames > 1
    return ClipSampler(options.num_frames or 1, options.frame_rate) if is_video else None


class _Rows(torch.utils.data.Dataset):
    """Rows looked at one by one, wherever the data loader runs."""

    def __init__(self, rows: Dataset, check: RowCheck, num_rows: int, shown: frozenset[int]) -> None:
        self.rows, self.check, self.num_rows, self.shown = rows, check, num_rows, shown

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, number: int) -> CheckedRow:
        return self.check(number, self.rows[number], with_thumbnails=number in self.shown)


def _checked(
    rows: Dataset | IterableDataset, check: RowCheck, num_rows: int | None, options: CheckOptions
) -> Iterable[CheckedRow]:
    if num_rows is None:
        return _stream_checked(rows, check, options)
    shown = frozenset(np.linspace(0, num_rows - 1, min(options.num_shown, num_rows)).round().astype(int).tolist())
    return DataLoader(_Rows(rows, check, num_rows, shown), batch_size=None, num_workers=options.num_workers)


def _stream_checked(rows: Iterable[Mapping[str, Any]], check: RowCheck, options: CheckOptions) -> Iterator[CheckedRow]:
    for number, row in enumerate(itertools.islice(stream_rows(rows), options.limit)):
        yield check(number, row, with_thumbnails=number < options.num_shown)


@dataclass
class _Findings:
    """What is kept of the rows that were looked at."""

    num_rows: int = 0
    bad: list[Listed] = field(default_factory=list)
    shown: list[CheckedRow] = field(default_factory=list)
    row: array = field(default_factory=lambda: array("q"))
    key: array = field(default_factory=lambda: array("Q"))
    prompt: array = field(default_factory=lambda: array("q"))
    first: array = field(default_factory=lambda: array("q"))
    second: array = field(default_factory=lambda: array("q"))
    label: array = field(default_factory=lambda: array("d"))
    words: array = field(default_factory=lambda: array("q"))
    features: array = field(default_factory=lambda: array("d"))
    sizes: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)
    rates: Counter = field(default_factory=Counter)
    num_unequal_sizes: int = 0
    num_unequal_lengths: int = 0

    def add(self, row: CheckedRow) -> None:
        self.num_rows += 1
        if row.problems or row.prompt is None or row.arms is None:
            self.bad.append(Listed(row.number, row.key, "; ".join(row.problems)))
            return
        first, second = row.arms
        self.row.append(row.number)
        self.key.append(int(row.key, 16))
        self.prompt.append(text_hash(row.prompt))
        self.first.append(first.content)
        self.second.append(second.content)
        self.label.append(row.label)
        self.words.append(len(row.prompt.split()))
        for arm in row.arms:
            self.sizes.update([arm.size] if arm.size else [])
            self.lengths.update([arm.num_frames] if arm.num_frames else [])
            self.rates.update([arm.frame_rate] if arm.frame_rate else [])
            self.features.extend(arm.features)
        self.num_unequal_sizes += first.size != second.size
        self.num_unequal_lengths += first.num_frames != second.num_frames
        if first.thumbnail is not None:
            self.shown.append(row)

    def judgements(self) -> Judgements:
        integers = (np.array(column, dtype=np.int64) for column in (self.row, self.prompt, self.first, self.second))
        return Judgements(*integers, np.array(self.label, dtype=np.float64))


def _summary(found: _Findings, fmt: PreferenceFormat, check: RowCheck) -> DataCheck:
    if found.num_rows == 0:
        raise DatasetError("the dataset is empty: it has no rows")
    judgements = found.judgements()
    repeats = find_repeats(judgements)
    kind = "latents" if fmt.holds_latents else "images" if check.videos is None else "videos"
    labels = judgements.label[~np.isnan(judgements.label)]
    is_soft = bool(((labels > 0) & (labels < 1) & (labels != TIE)).any())
    minority = float(np.minimum(labels, 1 - labels).mean()) if is_soft else None
    identical = judgements.row[judgements.is_identical]
    report = {
        "format": fmt.name,
        "kind": kind,
        "num_rows": found.num_rows,
        "num_bad": len(found.bad),
        **_label_counts(judgements.label),
        "num_identical_arms": len(identical),
        "num_repeated_pairs": repeats.num_pairs,
        "num_repeats": len(repeats.rows),
        "num_contradictory_pairs": repeats.num_contradictory_pairs,
        "num_unequal_sizes": found.num_unequal_sizes,
        "sizes": _common(found.sizes, lambda size: f"{size[0]}x{size[1]}"),
        **_video_statistics(found, check),
        "prompts": _prompt_statistics(judgements.prompt, np.array(found.words)),
        "label_noise": noise_report(repeats.agreement, find_triples(judgements), minority),
    }
    features = np.array(found.features).reshape(len(judgements.row), 2, len(FEATURES)) if check.measure else None
    keys = np.array(found.key, dtype=np.uint64)
    return DataCheck(report, _lists(found, identical, repeats), found.shown, judgements, keys, features)


def _label_counts(label: np.ndarray) -> dict[str, Any]:
    """Ties and rows without a label are no bad rows: training drops and counts them."""
    ties, unlabelled = int((label == TIE).sum()), int(np.isnan(label).sum())
    first = int((label > TIE).sum())
    decided = len(label) - ties - unlabelled
    counted = share(Count(first, decided))
    return {
        "num_ties": ties,
        "num_unlabelled": unlabelled,
        "num_pairs": decided,
        "first_preferred": None if counted is None else asdict(counted),
    }


def _video_statistics(found: _Findings, check: RowCheck) -> dict[str, Any]:
    if check.videos is None:
        return {}
    return {
        "num_unequal_lengths": found.num_unequal_lengths,
        "shortest_frames": min(found.lengths, default=None),
        "longest_frames": max(found.lengths, default=None),
        "frame_rates": _common(found.rates, str),
    }


def _prompt_statistics(prompts: np.ndarray, words: np.ndarray) -> dict[str, Any]:
    if len(prompts) == 0:
        return {"num_distinct": 0}
    distinct, counts = np.unique(prompts, return_counts=True)
    lengths = {name: int(np.quantile(words, at)) for name, at in _QUANTILES.items()}
    return {"num_distinct": len(distinct), "most_pairs_of_one": int(counts.max()), "words": lengths}


def _common(counter: Counter, name: Any) -> dict[str, int]:
    """The most common, and how many others there are."""
    common = {name(key): count for key, count in counter.most_common(_NUM_COMMON)}
    rest = sum(counter.values()) - sum(common.values())
    return {**common, "others": rest} if rest else common


def _lists(found: _Findings, identical: np.ndarray, repeats: Repeats) -> dict[str, Any]:
    rows, keys = np.array(found.row, dtype=np.int64), np.array(found.key, dtype=np.uint64)

    def listed(numbers: np.ndarray, reason: str) -> ListedRows:
        return ListedRows(numbers, keys[np.searchsorted(rows, numbers)], reason)

    return {
        "bad_rows": found.bad,
        "identical_arms": listed(identical, "both arms are the same"),
        # Without keys: those of an exact copy are those of the row that is to stay.
        "repeats": ListedRows(repeats.rows, None, "repeats an earlier row"),
        "contradictory": listed(repeats.contradictory_rows, "another row prefers the other arm"),
    }
