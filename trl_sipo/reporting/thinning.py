# SPDX-License-Identifier: Apache-2.0
"""Logs of any length in little memory: neighbouring rows become a point, which keeps their mean and extremes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# Points that a thinned log has at least, once it is longer; twice as many at most.
FEWEST_POINTS = 100
_MOST_KEYS = 300


@dataclass
class Cell:
    """The values of one key within a point.

    Attributes:
        total, count: Of the finite values.
        low, high: The smallest and the largest of them.
        num_broken: Values that are NaN or infinite.
    """

    total: float = 0.0
    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    num_broken: int = 0

    def add(self, other: "Cell") -> None:
        """Take in the values of another cell."""
        self.total, self.count = self.total + other.total, self.count + other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.num_broken += other.num_broken

    @property
    def mean(self) -> float | None:
        """None where any value is not finite: the line has a gap there."""
        return None if self.num_broken or not self.count else self.total / self.count


@dataclass
class _Point:
    step: float
    num_rows: int
    cells: dict[str, Cell] = field(default_factory=dict)

    def add(self, other: "_Point") -> None:
        self.step, self.num_rows = other.step, self.num_rows + other.num_rows
        for key, cell in other.cells.items():
            self.cells.setdefault(key, Cell()).add(cell)


@dataclass(frozen=True)
class Course:
    """One key over steps.

    Attributes:
        steps: Of the points, rising; a point that stands for several logs has the step of the last of them.
        means: None where a value was not finite.
        lows, highs: The extremes within each point, None as above.
        num_broken: Logged values that are not finite.
        first_broken: Step of the first point with such a value.
    """

    steps: list[float]
    means: list[float | None]
    lows: list[float | None]
    highs: list[float | None]
    num_broken: int = 0
    first_broken: float | None = None

    @property
    def finite(self) -> list[tuple[float, float]]:
        """Steps and means without the gaps."""
        return [(step, mean) for step, mean in zip(self.steps, self.means, strict=True) if mean is not None]

    @property
    def has_spread(self) -> bool:
        """Whether points stand for more than one value."""
        return any(low != high for low, high in zip(self.lows, self.highs, strict=True) if low is not None)


class ThinnedLog:
    """Rows of numbers by step, thinned while they come in.

    Up to twice `limit` points every row is a point of its own. Beyond that neighbours are merged two by two, and so
    again each time as many have come: of a long run means are drawn, between the smallest and the largest value.

    Args:
        limit: Points that remain after merging.
    """

    def __init__(self, limit: int = FEWEST_POINTS):
        self.limit = limit
        self.num_rows = 0
        self.num_disordered = 0
        self.rows_per_point = 1
        self._points: list[_Point] = []
        self._keys: dict[str, None] = {}

    def add(self, step: float, values: Mapping[str, float]) -> None:
        """Append a row; one whose step lies before the last is counted and left out."""
        if self._points and step < self._points[-1].step:
            self.num_disordered += 1
            return
        cells = {key: _cell(value) for key, value in values.items() if self._is_taken(key)}
        if not cells:
            return
        last = self._points[-1] if self._points else None
        if last is not None and step == last.step:  # of one step, such as evaluations of two datasets
            last.add(_Point(step, 0, cells))
            return
        self.num_rows += 1
        if last is not None and last.num_rows < self.rows_per_point:
            last.add(_Point(step, 1, cells))
            return
        self._points.append(_Point(step, 1, cells))
        if len(self._points) > 2 * self.limit:
            self._merge()

    @property
    def keys(self) -> list[str]:
        """In the order in which they came."""
        return list(self._keys)

    @property
    def last_step(self) -> float | None:
        """Of the last row."""
        return self._points[-1].step if self._points else None

    def course(self, key: str) -> Course | None:
        """One key over steps; None if it was never logged. Points that lack it are left out, which is no gap."""
        points = [(point.step, point.cells[key]) for point in self._points if key in point.cells]
        if not points:
            return None
        broken = [step for step, cell in points if cell.num_broken]
        return Course(
            [step for step, _ in points],
            [cell.mean for _, cell in points],
            [cell.low if cell.mean is not None else None for _, cell in points],
            [cell.high if cell.mean is not None else None for _, cell in points],
            sum(cell.num_broken for _, cell in points),
            broken[0] if broken else None,
        )

    def _is_taken(self, key: str) -> bool:
        if key not in self._keys and len(self._keys) >= _MOST_KEYS:
            return False
        self._keys[key] = None
        return True

    def _merge(self) -> None:
        pairs = [self._points[start : start + 2] for start in range(0, len(self._points), 2)]
        for first, *rest in pairs:
            for point in rest:
                first.add(point)
        self._points = [first for first, *_ in pairs]
        self.rows_per_point *= 2


def _cell(value: float) -> Cell:
    return Cell(value, 1, value, value) if math.isfinite(value) else Cell(num_broken=1)
