# SPDX-License-Identifier: Apache-2.0
"""A measure by step and noise level as an SVG heat map, in colours that all eyes order alike."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from trl_sipo.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, short

# Cividis (Nunez, Anderton and Renslow 2018), which was made to look alike with and without colour blindness.
_CIVIDIS = (
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
)
_KEY_WIDTH = 54.0  # of the legend on the right


@dataclass(frozen=True)
class HeatMap:
    """A measure by step and noise level.

    Attributes:
        title: What is shown.
        steps: Of the columns.
        times: Of the rows, in schedule time, rising.
        cells: (columns, rows); None is not known.
        low, high: The values of the first and the last colour.
        note: How to read it.
    """

    title: str
    steps: Sequence[float]
    times: Sequence[float]
    cells: Sequence[Sequence[float | None]]
    low: float
    high: float
    note: str = ""


def colour_of(share: float) -> str:
    """A colour between the darkest (0) and the lightest (1)."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    index = min(int(place), len(_CIVIDIS) - 2)
    pairs = zip(_channels(_CIVIDIS[index]), _channels(_CIVIDIS[index + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in pairs)


def _channels(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def describe_heat_map(chart: HeatMap) -> str:
    """The text alternative: the first and the last column, and the extremes."""
    known = [(value, step, time) for step, column in zip(chart.steps, chart.cells, strict=True)
             for time, value in zip(chart.times, column, strict=True) if value is not None]  # fmt: skip
    if not known:
        return f"{chart.title}: no number."
    (low, low_step, low_time), (high, high_step, high_time) = min(known), max(known)
    ends = [(step, _mean(column)) for step, column in zip(chart.steps, chart.cells, strict=True)]
    first, last = ends[0], ends[-1]
    return (
        f"{chart.title}. Mean over noise levels {short(first[1])} at step {short(first[0])}, {short(last[1])} at "
        f"step {short(last[0])}. Lowest {short(low)} at time {short(low_time)}, step {short(low_step)}; highest "
        f"{short(high)} at time {short(high_time)}, step {short(high_step)}."
    )


def _mean(column: Sequence[float | None]) -> float | None:
    known = [value for value in column if value is not None]
    return sum(known) / len(known) if known else None


def heat_map(chart: HeatMap) -> str:
    """The heat map as SVG: steps to the right, noise upwards."""
    right, base = WIDTH - RIGHT - _KEY_WIDTH, HEIGHT - BOTTOM
    width, height = (right - LEFT) / len(chart.steps), (base - TOP) / len(chart.times)
    span = (chart.high - chart.low) or 1.0
    cells = []
    for column, values in enumerate(chart.cells):
        for row, value in enumerate(values):
            x, y = LEFT + column * width, base - (row + 1) * height
            fill = 'class="unknown"' if value is None else f'fill="{colour_of((value - chart.low) / span)}"'
            # A little larger than a cell, so that no line of the background shines through.
            cells.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width + 0.4:.1f}" height="{height + 0.4:.1f}" {fill}/>'
            )
    column = f'<rect class="column" x="{right - width:.1f}" y="{TOP:g}" width="{width:.1f}" height="{base - TOP:g}"/>'
    return (
        f'<svg class="chart heat" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{html.escape(describe_heat_map(chart))}">{_axes(chart, right, base, width, height)}'
        f"<g>{''.join(cells)}</g>{column}{_key(chart, right + 14, base)}</svg>"
    )


def _axes(chart: HeatMap, right: float, base: float, width: float, height: float) -> str:
    parts = []
    every = max(1, len(chart.steps) // 5)
    for column in range(0, len(chart.steps), every):
        x = LEFT + (column + 0.5) * width
        parts.append(f'<text x="{x:.1f}" y="{base + 16:g}">{short(chart.steps[column])}</text>')
    for row in range(0, len(chart.times), max(1, len(chart.times) // 5)):
        y = base - (row + 0.5) * height
        parts.append(f'<text class="y" x="{LEFT - 6:g}" y="{y + 4:.1f}">{short(chart.times[row])}</text>')
    parts.append(f'<text class="end label" x="{LEFT - 18:g}" y="{base + 16:g}">step</text>')
    return f'<g class="grid" aria-hidden="true">{"".join(parts)}</g>'


def _key(chart: HeatMap, left: float, base: float) -> str:
    """The legend: the colours in ten pieces, with the values at its ends and between."""
    axis = Axis(chart.low, chart.high if chart.high > chart.low else chart.low + 1, base, TOP)
    pieces, height = 24, (base - TOP) / 24
    blocks = [
        f'<rect x="{left:g}" y="{base - (piece + 1) * height:.1f}" width="10" height="{height + 0.4:.1f}" '
        f'fill="{colour_of((piece + 0.5) / pieces)}"/>'
        for piece in range(pieces)
    ]
    words = [
        f'<text class="start" x="{left + 14:g}" y="{axis.place(value) + 4:.1f}">{short(value)}</text>'
        for value in axis.ticks
    ]
    return f'<g class="grid" aria-hidden="true">{"".join(blocks)}{"".join(words)}</g>'
