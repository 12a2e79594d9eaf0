# SPDX-License-Identifier: Apache-2.0
"""Pictures of frontiers: win rate against Frechet distance by cell, and the areas with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from beyond.analysis import Areas
from beyond.area import FRECHET_BEST, FRECHET_WORST, on_frontier, on_plane
from beyond.protocol import Cell

from trl_sipo.reporting.figures import MARKERS, Series, label_axes, line_style, new_figure, quality_figure

#: Upper edge of a panel over the worst quality, beyond which all policies are alike, and its left edge.
_HEADROOM, _LEFT = 1.25, 0.3
#: Room at the edges, where policies beyond them are drawn.
_MARGIN = 0.015
PANELS_PER_ROW = 3


def frontier_figure(areas: Areas, cells: Sequence[Cell], methods: Sequence[str]) -> Any:
    """A panel per cell: policies of each method, faint, and the line through those on its frontier.

    Up is worse: the Frechet distance is on a logarithmic axis, so that the lower right is where one wants to be. What
    lies beyond the worst quality, or loses nearly all comparisons, is drawn at the edge.
    """
    columns = min(PANELS_PER_ROW, len(cells))
    rows = -(-len(cells) // columns)
    figure = new_figure(figsize=(4.0 * columns + 0.4, 3.5 * rows + 0.9))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, cell in zip(grid.flat, cells, strict=False):
        for index, method in enumerate(methods):
            if method in areas.points[cell]:
                _draw(axes, areas, cell, method, index)
        shown = [areas.measured(cell, method)[0].means for method in methods if method in areas.points[cell]]
        lowest = min((float(np.nanmin(means[:, 1], initial=np.inf)) for means in shown), default=np.inf)
        _finish(axes, cell.name.replace("_", " "), areas.bases[cell.base]["frechet_distance"], lowest)
    for axes in list(grid.flat)[len(cells) :]:
        axes.set_visible(False)
    _legend(figure, methods)
    return figure


def _draw(axes: Any, areas: Areas, cell: Cell, method: str, index: int) -> None:
    points, base = areas.measured(cell, method)
    means = points.means
    edge = FRECHET_WORST * base["frechet_distance"] * (_HEADROOM - 0.1)
    x, y = means[:, 0].clip(min=_LEFT + _MARGIN), np.nan_to_num(means[:, 1], nan=edge).clip(max=edge)
    style, marker = line_style(index), _marker(index)
    axes.scatter(x, y, color=style["color"], marker=marker, s=14, alpha=0.35, linewidth=0)
    is_on = on_frontier(on_plane(means, base))
    order = np.argsort(x[is_on])
    axes.plot(x[is_on][order], y[is_on][order], **{**style, "marker": marker}, markersize=5, linewidth=1.5)


def _marker(index: int) -> str:
    return MARKERS[1:][index % (len(MARKERS) - 1)]  # without the star, which is small


def _finish(axes: Any, title: str, base: float, lowest: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.axvline(0.5, color="#555555", linewidth=0.8)
    axes.plot([0.5], [base], marker="o", markersize=9, color="#000000", markerfacecolor="none", linestyle="none")
    axes.axhline(FRECHET_WORST * base, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlim(_LEFT, 1.0)
    axes.set_ylim(max(FRECHET_BEST * base, 0.9 * min(lowest, base)), FRECHET_WORST * _HEADROOM * base)
    axes.yaxis.set_major_locator(FixedLocator([share * base for share in (0.5, 1, 2, 4)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    label_axes(axes, title, "win rate over the base", "Frechet distance (lower is better)")


def _legend(figure: Any, methods: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **{**line_style(index), "marker": _marker(index)}, label=method)
        for index, method in enumerate(methods)
    ]
    base = {"marker": "o", "markersize": 9, "color": "#000000", "markerfacecolor": "none", "linestyle": "none"}
    handles.append(Line2D([], [], **base, label="base"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def long_figure(long: Mapping[str, Any], measures: Mapping[str, str]) -> Any:
    """Measures over the steps of the long runs, a panel per cell and measure; bands span the seeds.

    Args:
        long: As `analysis.long_runs` gives it.
        measures: Measure -> its title; the Frechet distance, which must be one of them, is on a logarithmic axis.
    """
    panels = {
        f"{cell.replace('_', ' ')}: {title}": [Series(name, arm["steps"], arm[measure]) for name, arm in arms.items()]
        for cell, arms in long.items()
        for measure, title in measures.items()
    }
    figure = quality_figure(panels, columns=len(measures))
    for axes in figure.axes:
        if axes.get_title(loc="left").endswith(measures["frechet_distance"]):
            axes.set_yscale("log")
    return figure


def area_figure(methods: Mapping[str, Mapping[str, Any]]) -> Any:
    """The cross-fitted area of each method over the main cells with its interval, and that of each base.

    Args:
        methods: As `analysis.over_cells` gives them; those that were not made in every cell are marked.
    """
    names = sorted(methods, key=lambda method: methods[method]["value"])
    bases = list(dict.fromkeys(base for row in methods.values() for base in row["by_base"]))
    most = max(row["cells"] for row in methods.values())
    figure = new_figure(figsize=(8.0, 0.32 * len(names) + 1.4))
    axes = figure.subplots()
    for height, name in enumerate(names):
        row = methods[name]
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [height, height], color="#000000", linewidth=1.5)
        axes.plot([row["value"]], [height], marker="|", markersize=13, markeredgewidth=2.2, color="#000000")
        for index, base in enumerate(bases):
            if base in row["by_base"]:
                style = {"color": line_style(index)["color"], "marker": MARKERS[1:][index], "linestyle": "none"}
                label = f"base: {base}" if height == 0 else None
                axes.plot([row["by_base"][base]["value"]], [height], **style, markersize=5, alpha=0.8, label=label)
    labels = [name if methods[name]["cells"] == most else f"{name} ({methods[name]['cells']} cells)" for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    label_axes(axes, "", "cross-fitted area below the frontier; bar: all cells, with the 95 % interval", "")
    axes.set_xlim(left=0)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return figure
