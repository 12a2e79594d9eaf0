# SPDX-License-Identifier: Apache-2.0
"""A chart with what belongs to it: title, legend, numbers as a table; as markup, and as data for the script."""

import html
import re
from typing import Any

from trl_sipo.reporting.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    axes_of,
    line_chart,
    short,
    swatch,
)
from trl_sipo.reporting.heat_maps import HeatMap, heat_map
from trl_sipo.reporting.level_panels import FramedChart
from trl_sipo.reporting.page import table_markup
from trl_sipo.reporting.run_charts import table_of

# The plot within a chart, for the script.
PLOT = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}


class ChartCards:
    """Makes cards, and collects the numbers that the script reads out.

    Attributes:
        data: Card's id -> numbers.
    """

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}

    def line_card(self, chart: Chart) -> str:
        """A card of a line chart."""
        card_id = self._id_of(chart.title)
        self.data[card_id] = _line_data(chart)
        return _card(
            card_id, chart.title, line_chart(chart), _legend(chart), " ".join(filter(None, (chart.note, *chart.gaps))),
            table_markup(*table_of(chart)),
        )  # fmt: skip

    def framed_card(self, framed: FramedChart, steps: list[int], group: str) -> str:
        """A card of a chart that a slider goes through.

        Args:
            group: Id of the slider.
        """
        card_id = self._id_of(f"{framed.chart.title} {group}")
        self.data[card_id] = {
            **_line_data(framed.chart),
            "group": group,
            "frames": [[_numbers(line) for line in frame] for frame in framed.frames],
            "texts": framed.texts,
        }
        header = ["noise", *(f"{line.label}, step {step}" for step in steps for line in _moving(framed))]
        rows = [
            [short(time), *(short(line[index]) for frame in framed.frames for line in frame)]
            for index, time in enumerate(framed.times)
        ]
        text = f'<p class="frame-text" aria-live="polite">{html.escape(framed.texts[-1])}</p>'
        chart = framed.chart
        table = table_markup(header, rows)
        return _card(card_id, chart.title, line_chart(chart), _legend(chart), chart.note, table, text)

    def map_card(self, chart: HeatMap, group: str) -> str:
        """A card of a heat map.

        Args:
            group: Id of the slider whose step is marked.
        """
        card_id = self._id_of(f"{chart.title} {group}")
        cells = [_numbers(column) for column in chart.cells]
        self.data[card_id] = {"group": group, "heat": {"steps": chart.steps, "times": chart.times, "cells": cells}}
        header = ["step", *(f"time {short(time)}" for time in chart.times)]
        rows = [[short(step), *map(short, column)] for step, column in zip(chart.steps, chart.cells, strict=True)]
        note = f"{chart.note} Up: more noise. Grey: no pair."
        return _card(card_id, chart.title, heat_map(chart), "", note, table_markup(header, rows))

    def _id_of(self, title: str) -> str:
        """An id that stays when the page is made again with other charts beside this one."""
        name = "chart-" + re.sub("[^a-z0-9]+", "-", title.lower())
        taken = sum(card_id == name or card_id.rpartition("--")[0] == name for card_id in self.data)
        return f"{name}--{taken + 1}" if taken else name


def _moving(framed: FramedChart):
    return framed.chart.lines[: len(framed.frames[0])]


def _numbers(values) -> list[float | None]:
    return [None if value is None else float(f"{value:.5g}") for value in values]


def _line_data(chart: Chart) -> dict[str, Any]:
    x_axis, y_axis = axes_of(chart)
    lines = []
    for line in chart.lines:
        entry: dict[str, Any] = {"label": line.label, "x": _numbers(line.x), "y": _numbers(line.y)}
        if line.low:
            entry |= {"low": _numbers(line.low), "high": _numbers(line.high)}
        lines.append(entry)
    return {
        "x": [x_axis.low, x_axis.high],
        "y": [y_axis.low, y_axis.high],
        "log": y_axis.is_log,
        "xLabel": chart.x_label,
        "lines": lines,
    }


def _legend(chart: Chart) -> str:
    # Without the script nothing can be switched: the buttons are then disabled, and read as a legend.
    entries = "".join(
        f'<li><button type="button" disabled aria-pressed="true" data-line="{index}">'
        f"{swatch(line.style, is_faint=line.is_faint)}{html.escape(line.label)}</button></li>"
        for index, line in enumerate(chart.lines)
    )
    return f'<ul class="legend">{entries}</ul>'


def _card(card_id: str, title: str, svg: str, legend: str, note: str, table: str, text: str = "") -> str:
    return (
        f'<figure class="card" id="{card_id}"><h3>{html.escape(title)}</h3>{legend}<div class="plot">{svg}</div>{text}'
        f"<figcaption>{html.escape(note)}</figcaption>"
        f'<details id="{card_id}-table"><summary>Numbers</summary>{table}</details></figure>'
    )
