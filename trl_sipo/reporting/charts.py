# SPDX-License-Identifier: Apache-2.0
"""Line charts and heat maps as inline SVG, drawn from plain numbers; colours and dashes are classes of the page.

A chart is 400 units wide, about as many pixels as it gets on a page: its text is of the size of the page's. It carries
its own text alternative. Numbers are thinned before they come here.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trl_sipo.reporting.figures import COLOURS

WIDTH, HEIGHT = 400.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 26.0
NUM_STYLES = len(COLOURS)
_MOST_MARKERS = 40
_LABEL_HEIGHT = 24.0  # above the axis below, that the name of a limit needs
_ASIDE = 4.0
_NAME_WIDTH = 110.0
_DECADES = 2.5  # that positive values span before their axis is logarithmic
_FEW_DECADES = 2.2  # within which 2 and 5 times a power of ten have their ticks
_MARKERS = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
    "m-2.7 -2.7h5.4v5.4h-5.4z",
    "m0 -3.6l3.4 6.2h-6.8z",
    "m0 -3.8l3.4 3.8l-3.4 3.8l-3.4 -3.8z",
    "m0 3.6l3.4 -6.2h-6.8z",
    "m-3.2 -1.1h2.1v-2.1h2.2v2.1h2.1v2.2h-2.1v2.1h-2.2v-2.1h-2.1z",
    "m-3 -1.8l1.2 -1.2l1.8 1.8l1.8 -1.8l1.2 1.2l-1.8 1.8l1.8 1.8l-1.2 1.2l-1.8 -1.8l-1.8 1.8l-1.2 -1.2l1.8 -1.8z",
    "m-3.4 0l6.2 -3.4v6.8z",
)


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: For the legend, the read-out and the table.
        x: Rising.
        y: One per x; None is a gap.
        low, high: Of a band, or of whiskers where `is_measured`; empty: none.
        style: Which colour, dash and marker, from 0.
        is_faint: Drawn thin and without markers: what is noisy, or stands behind.
        is_measured: Drawn with whiskers in place of a band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    style: int = 0
    is_faint: bool = False
    is_measured: bool = False


@dataclass(frozen=True)
class Chart:
    """A titled line chart.

    Attributes:
        title: What is drawn.
        lines: At least one.
        note: How to read it.
        x_label: Of the axis below; a short word.
        levels: Horizontal lines and their names, such as (0.5, "chance"), which are always within the picture.
        limits: The same, drawn if the lines come near.
        x_range, y_range: Fixed instead of what the lines span.
        is_log: Whether a fixed range of values, which is then above 0, is logarithmic.
        shaded_below: The region below this value is shaded.
        gaps: Sentences on what is missing.
    """

    title: str
    lines: Sequence[Line]
    note: str = ""
    x_label: str = "step"
    levels: Sequence[tuple[float, str]] = ()
    limits: Sequence[tuple[float, str]] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    is_log: bool = False
    shaded_below: float | None = None
    gaps: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Axis:
    """From values to units of the picture.

    Attributes:
        low, high: The values at its ends.
        begin, end: Where these are.
        is_log: Logarithmic.
    """

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value is."""
        low, high, value = (_log(part) if self.is_log else part for part in (self.low, self.high, value))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    @property
    def ticks(self) -> list[float]:
        """A few round values within."""
        return _decades(self.low, self.high) if self.is_log else round_ticks(self.low, self.high)


def _log(value: float) -> float:
    return math.log10(max(value, 1e-300))


def round_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `count` of them."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.8 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them between where they are few; round values within one."""
    first, last = math.ceil(_log(low) - 1e-9), math.floor(_log(high) + 1e-9)
    if _log(high) - _log(low) < _FEW_DECADES:
        steps = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        within = [step for step in steps if low * (1 - 1e-9) <= step <= high * (1 + 1e-9)]
        return within if len(within) > 2 else round_ticks(low, high)
    every = max(1, (last - first) // 4 + ((last - first) % 4 > 0))
    return [10.0**power for power in range(first, last + 1, every)]


def short(value: float | None) -> str:
    """Four significant digits, without zeros at the end; "-" of what is not known."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    text = f"{value:.4g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def axes_of(chart: Chart) -> tuple[Axis, Axis]:
    """The axis of the steps, and that of the values."""
    xs = [value for line in chart.lines for value in line.x] or [0.0, 1.0]
    x_axis = Axis(*(chart.x_range or _widened(min(xs), max(xs))), LEFT, WIDTH - RIGHT)
    if chart.y_range is not None:
        return x_axis, Axis(*chart.y_range, HEIGHT - BOTTOM, TOP, chart.is_log)
    values = [value for line in chart.lines for part in (line.y, line.low, line.high) for value in part]
    found = [value for value in values if value is not None] + [value for value, _ in chart.levels]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    is_log = low > 0 and _log(high) - _log(low) > _DECADES
    if not is_log:
        low, high = _widened(low, high)
        margin = 0.05 * (high - low)
        low, high = low - margin * (low != 0), high + margin
    return x_axis, Axis(low, high, HEIGHT - BOTTOM, TOP, is_log)


def _widened(low: float, high: float) -> tuple[float, float]:
    """An interval that is one: a single value gets some room."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    room = 0.5 * abs(low) or 0.5
    return low - room, high + room


def describe(chart: Chart) -> str:
    """The text alternative: each line's course in words."""
    return " ".join([f"{chart.title}.", *(_course(line, chart.x_label) for line in chart.lines), *chart.gaps])


def _course(line: Line, x_label: str) -> str:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    if not points:
        return f"{line.label}: no number."
    (first_x, first), (last_x, last) = points[0], points[-1]
    if len(points) == 1:
        return f"{line.label}: {short(first)} at {x_label} {short(first_x)}."
    lowest, highest = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    return (
        f"{line.label}: {short(first)} at {x_label} {short(first_x)}, {short(last)} at {x_label} {short(last_x)}; "
        f"lowest {short(lowest[1])} at {short(lowest[0])}, highest {short(highest[1])} at {short(highest[0])}."
    )


def line_chart(chart: Chart) -> str:
    """The chart as SVG."""
    x_axis, y_axis = axes_of(chart)
    parts = [_shade(chart, y_axis), _grid(chart, x_axis, y_axis)]
    parts += [line_group(line, index, x_axis, y_axis) for index, line in enumerate(chart.lines)]
    alternative = html.escape(describe(chart))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{alternative}">'
        f"{''.join(parts)}</svg>"
    )


def _shade(chart: Chart, y_axis: Axis) -> str:
    if chart.shaded_below is None:
        return ""
    top = min(max(y_axis.place(chart.shaded_below), TOP), HEIGHT - BOTTOM)
    height = HEIGHT - BOTTOM - top
    return f'<rect class="shade" x="{LEFT:g}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT:g}" height="{height:.1f}"/>'


def _grid(chart: Chart, x_axis: Axis, y_axis: Axis) -> str:
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y_axis.ticks:
        y = y_axis.place(value)
        parts.append(f'<path d="M{LEFT:g} {y:.1f}H{right:g}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6:g}" y="{y + 4:.1f}">{short(value)}</text>')
    for value in x_axis.ticks:
        x = x_axis.place(value)
        parts.append(f'<path d="M{x:.1f} {base:g}v4"/>')
        anchor = ' class="end"' if x > right - 18 else ""
        parts.append(f'<text{anchor} x="{x:.1f}" y="{base + 16:g}">{short(value)}</text>')
    parts.append(f'<text class="end label" x="{LEFT - 18:g}" y="{base + 16:g}">{html.escape(chart.x_label)}</text>')
    for value, name in (*chart.levels, *chart.limits):
        if y_axis.low <= value <= y_axis.high:
            y = y_axis.place(value)
            parts.append(f'<path class="level" d="M{LEFT:g} {y:.1f}H{right:g}"/>')
            if base - y > _LABEL_HEIGHT or (value, name) in chart.levels:
                side, x = ("end", right - 4) if _is_crowded(chart, x_axis, y_axis, y) else ("start", LEFT + 4)
                parts.append(f'<text class="label {side}" x="{x:g}" y="{y - 4:.1f}">{html.escape(name)}</text>')
    return f'<g class="grid" aria-hidden="true">{"".join(parts)}</g>'


def _is_crowded(chart: Chart, x_axis: Axis, y_axis: Axis, y: float) -> bool:
    """Whether lines come nearer to a height where a name on the left would stand than to that on the right."""
    points = [
        (x_axis.place(x), v) for line in chart.lines for x, v in zip(line.x, line.y, strict=True) if v is not None
    ]
    left = [abs(y_axis.place(value) - y) for x, value in points if x < LEFT + _NAME_WIDTH]
    right = [abs(y_axis.place(value) - y) for x, value in points if x > WIDTH - RIGHT - _NAME_WIDTH]
    return min(left, default=math.inf) < min(right, default=math.inf)


def line_group(line: Line, index: int, x_axis: Axis, y_axis: Axis) -> str:
    """One line with its band or whiskers and its markers."""
    # Whiskers of several lines at one step stand beside one another.
    aside = _ASIDE * index if line.is_measured else 0.0
    xs = [x_axis.place(value) + aside for value in line.x]
    places = [None if value is None else y_axis.place(value) for value in line.y]
    parts = []
    if line.low:
        lows, highs = ([None if v is None else y_axis.place(v) for v in part] for part in (line.low, line.high))
        parts.append(_whiskers(xs, lows, highs) if line.is_measured else _band(xs, lows, highs))
    parts.append(f'<path class="line" d="{path_of(xs, places)}"/>')
    if not line.is_faint and len(xs) <= _MOST_MARKERS:
        shape = _MARKERS[line.style % len(_MARKERS)]
        marks = "".join(f"M{x:.1f} {y:.1f}{shape}" for x, y in zip(xs, places, strict=True) if y is not None)
        parts.append(f'<path class="mark" d="{marks}"/>')
    style = line.style % NUM_STYLES
    faint = " faint" if line.is_faint else ""
    return f'<g class="series c{style} d{style}{faint}" data-line="{index}">{"".join(parts)}</g>'


def path_of(xs: Sequence[float], ys: Sequence[float | None]) -> str:
    """A path through the points, broken at gaps; a point alone is a short stroke."""
    words, is_down = [], False
    for position, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if y is None:
            is_down = False
            continue
        words.append(f"{'L' if is_down else 'M'}{x:.1f} {y:.1f}")
        if not is_down and (position + 1 == len(ys) or ys[position + 1] is None):
            words.append("h0.1")
        is_down = True
    return "".join(words)


def _band(xs: Sequence[float], lows: Sequence[float | None], highs: Sequence[float | None]) -> str:
    runs: list[list[tuple[float, float, float]]] = [[]]
    for x, low, high in zip(xs, lows, highs, strict=True):
        if low is None or high is None:
            runs.append([])
        else:
            runs[-1].append((x, low, high))
    shapes = []
    for run in filter(None, runs):
        there = "L".join(f"{x:.1f} {high:.1f}" for x, _, high in run)
        back = "L".join(f"{x:.1f} {low:.1f}" for x, low, _ in reversed(run))
        shapes.append(f"M{there}L{back}Z")
    return f'<path class="band" d="{"".join(shapes)}"/>'


def _whiskers(xs: Sequence[float], lows: Sequence[float | None], highs: Sequence[float | None]) -> str:
    strokes = [
        f"M{x:.1f} {low:.1f}V{high:.1f}m-3 0h6M{x - 3:.1f} {low:.1f}h6"
        for x, low, high in zip(xs, lows, highs, strict=True)
        if low is not None and high is not None
    ]
    return f'<path class="whisker" d="{"".join(strokes)}"/>'


def swatch(style: int, *, is_faint: bool = False) -> str:
    """A short piece of a line, for a legend."""
    style = style % NUM_STYLES
    mark = "" if is_faint else f'<path class="mark" d="M13 6{_MARKERS[style % len(_MARKERS)]}"/>'
    faint = " faint" if is_faint else ""
    return (
        f'<svg class="swatch" viewBox="0 0 26 12" aria-hidden="true"><g class="series c{style} d{style}{faint}">'
        f'<path class="line" d="M1 6H25"/>{mark}</g></svg>'
    )
