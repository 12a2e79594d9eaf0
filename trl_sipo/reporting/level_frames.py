# SPDX-License-Identifier: Apache-2.0
"""Numbers by noise level as they move over steps: evaluations one by one, training draws pooled."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_sipo.reporting.run_lines import as_number

FEWEST_FRAMES = 20
_MOST_LEVELS = 64
_MEASURES = (
    "importance_weight", "masked", "chosen_error", "rejected_error", "chosen_ref_error", "rejected_ref_error",
    "margin", "timestep",
)  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Means by noise level of the pairs that were seen up to a step, or at it.

    Attributes:
        step: The last one.
        levels: Schedule time (0 is clean, 1 pure noise) -> measure -> mean; with `pairs`, how many they are of.
    """

    step: int
    levels: Mapping[float, Mapping[str, float]]

    def values(self, measure: str, times: Sequence[float]) -> list[float | None]:
        """One measure at the times; None where it is not known or not finite."""
        found = [self.levels.get(time, {}).get(measure) for time in times]
        return [value if value is not None and math.isfinite(value) else None for value in found]


def read_levels(row: Mapping[str, Any]) -> dict[float, dict[str, float]]:
    """The levels of a line of `levels.jsonl`; what is not as it must be is left out.

    Of more than 64 levels every second is kept, or every third, and so on: they span the schedule as all of them do.
    """
    levels = row.get("levels")
    found: dict[float, dict[str, float]] = {}
    entries = levels if isinstance(levels, list) else []
    for entry in entries[:: -(-len(entries) // _MOST_LEVELS) or 1]:
        time = as_number(entry.get("time")) if isinstance(entry, dict) else None
        if time is None or not 0 <= time <= 1:
            continue
        numbers = {name: as_number(entry.get(name)) for name in _MEASURES}
        pairs = as_number(entry.get("pairs"))
        values = {name: value for name, value in numbers.items() if value is not None}
        found[round(time, 6)] = {**values, "pairs": pairs if pairs is not None and pairs > 0 else 1.0}
    return dict(sorted(found.items()))


class ExactFrames:
    """Frames as they are; when there are too many, every second goes, but never the first and the last."""

    def __init__(self, limit: int = FEWEST_FRAMES):
        self.limit = limit
        self.num_seen = 0
        self._kept: list[Frame] = []
        self._last: Frame | None = None
        self._every = 1

    def add(self, step: int, levels: dict[float, dict[str, float]]) -> None:
        """Append one; frames whose step is no later than the last one's are left out."""
        if not levels or (self._last is not None and step <= self._last.step):
            return
        self._last = Frame(step, levels)
        if self.num_seen % self._every == 0:
            self._kept.append(self._last)
        self.num_seen += 1
        if len(self._kept) > 2 * self.limit:
            self._kept, self._every = self._kept[::2], 2 * self._every

    @property
    def frames(self) -> list[Frame]:
        """By step."""
        last = [self._last] if self._last is not None and self._last is not self._kept[-1] else []
        return self._kept + last


class PooledFrames:
    """Frames of few draws each, which are pooled, weighted by their pairs, two by two when there are too many."""

    def __init__(self, limit: int = FEWEST_FRAMES):
        self.limit = limit
        self.num_seen = 0
        self._frames: list[tuple[int, int, dict[float, dict[str, float]]]] = []
        self._every = 1

    def add(self, step: int, levels: dict[float, dict[str, float]]) -> None:
        """Append one; frames whose step lies before the last one's are left out."""
        if not levels or (self._frames and step < self._frames[-1][0]):
            return
        self.num_seen += 1
        if self._frames and self._frames[-1][1] < self._every:
            self._frames[-1] = _pooled(self._frames[-1], (step, 1, levels))
        else:
            self._frames.append((step, 1, levels))
        if len(self._frames) > 2 * self.limit:
            starts = range(0, len(self._frames), 2)
            pairs = [self._frames[start : start + 2] for start in starts]
            self._frames = [_pooled(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
            self._every *= 2

    @property
    def frames(self) -> list[Frame]:
        """By step."""
        return [Frame(step, levels) for step, _, levels in self._frames]


_Part = tuple[int, int, dict[float, dict[str, float]]]


def _pooled(first: _Part, second: _Part) -> _Part:
    times = sorted({*first[2], *second[2]})
    levels = {time: _mean(first[2].get(time), second[2].get(time)) for time in times}
    return second[0], first[1] + second[1], levels


def _mean(one: dict[str, float] | None, other: dict[str, float] | None) -> dict[str, float]:
    if one is None or other is None:
        return one or other or {}
    pairs = one["pairs"] + other["pairs"]
    both = {
        name: (one[name] * one["pairs"] + other[name] * other["pairs"]) / pairs
        for name in one
        if name in other and name != "pairs"
    }
    return {**one, **other, **both, "pairs": pairs}
