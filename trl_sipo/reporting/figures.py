# SPDX-License-Identifier: Apache-2.0
"""Figures of preference training: w(t), reward dynamics, quality over steps, sample grids.

Needs matplotlib (extra `plots`). Each function takes plain numbers and returns a `matplotlib.figure.Figure`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from PIL import Image

from trl_sipo.errors import ConfigurationError

# Okabe and Ito's colour-blind-safe palette; line styles repeat the distinction without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
# One more than the colours, so that beyond these the pairs of both differ.
MARKERS = ("*", "o", "s", "^", "D", "v", "P", "X", "<")


@dataclass(frozen=True)
class Series:
    """One method over steps, with one list of values per seed.

    Attributes:
        label: For the legend.
        steps: Common to all seeds.
        values: (seeds, steps).
    """

    label: str
    steps: Sequence[float]
    values: Sequence[Sequence[float]]

    @property
    def centre(self) -> list[float]:
        """Mean over seeds at each step."""
        return [mean(column) for column in zip(*self.values, strict=True)]

    @property
    def low(self) -> list[float]:
        """Smallest value over seeds at each step."""
        return [min(column) for column in zip(*self.values, strict=True)]

    @property
    def high(self) -> list[float]:
        """Largest value over seeds at each step."""
        return [max(column) for column in zip(*self.values, strict=True)]


@dataclass(frozen=True)
class Point:
    """One model in two measures, with one value per seed of each.

    Attributes:
        label: For the legend.
        x, y: (seeds,).
        is_hollow: Drawn without a filling, and without a line in the legend.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    is_hollow: bool = False


def check_plotting() -> None:
    """Raise [`ConfigurationError`] when matplotlib is not installed; call it before long work that ends in figures."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("Figures need matplotlib: `pip install trl-sipo[plots]`.") from error


def new_figure(**options: Any):
    """An empty figure that belongs to no window."""
    check_plotting()
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def line_style(index: int) -> dict[str, Any]:
    """Colour and line of the index-th line of a figure, told apart without colour too."""
    style = {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index % len(STYLES)]}
    return style if index < len(COLOURS) else {**style, "marker": MARKERS[index // len(COLOURS)]}


def label_axes(axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels, a light grid, and no frame."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(axes, series: Sequence[Series], scale: float = 1.0) -> None:
    for index, line in enumerate(series):
        style = line_style(index)
        axes.plot(line.steps, [scale * value for value in line.centre], label=line.label, **style)
        if len(line.values) > 1:
            low, high = ([scale * value for value in bound] for bound in (line.low, line.high))
            axes.fill_between(line.steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def importance_weight_figure(
    levels: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    threshold: float | None = 0.9,
    *,
    title: str = "Importance weight w(t) on held-out images",
    level_label: str = "timestep t (0 is clean)",
):
    """w against the noise level, one curve per model (Fig. 4 of the SIPO paper); the masked region lies below."""
    figure = new_figure(figsize=(8.2, 3.6))
    axes = figure.subplots()
    for index, (label, weights) in enumerate(curves.items()):
        axes.plot(levels, weights, label=label, **line_style(index))
    if threshold is not None:
        axes.axhspan(0, threshold, color="#999999", alpha=0.15, linewidth=0)
        axes.text(levels[-1], threshold / 2, "masked", ha="right", va="center", color="#555555")
    axes.set_ylim(0, 1.02)
    label_axes(axes, title, level_label, "mean w(t)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def reward_figure(panels: Mapping[str, tuple[Series, Series]]):
    """Held-out chosen and rejected rewards over steps, one panel per method (Fig. 2 of the SIPO paper)."""
    figure = new_figure(figsize=(3.0 * len(panels), 3.0))
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, (chosen, rejected)) in zip(row, panels.items(), strict=True):
        _draw(axes, (chosen, rejected))
        axes.axhline(0, color="#555555", linewidth=0.8)
        label_axes(axes, label, "step", "reward")
        axes.legend(frameon=False, fontsize=8)
    return figure


def quality_figure(
    panels: Mapping[str, Sequence[Series]], columns: int = 3, *, x_label: str = "step", x_scale: str = "linear"
):
    """Several measures over steps, one panel each, one line per method; the band spans the seeds.

    Args:
        x_label, x_scale: Of what takes the place of the steps, and matplotlib's name of its scale.
    """
    rows = -(-len(panels) // columns)
    figure = new_figure(figsize=(3.6 * columns, 2.9 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (label, series) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, series)
        label_axes(axes, label, x_label, "")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xscale(x_scale)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    return figure


def trade_off_figure(panels: Mapping[str, Sequence[Point]], labels: tuple[str, str], columns: int = 2):
    """Models in two measures, the first on a logarithmic axis, one panel each; bars span the seeds.

    Args:
        labels: What the measures are.
    """
    rows = -(-len(panels) // columns)
    figure = new_figure(figsize=(4.8 * columns, 3.8 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    names = list(dict.fromkeys(point.label for points in panels.values() for point in points))
    handles = {}
    for axes, (title, points) in zip(grid.flat, panels.items(), strict=False):
        for point in points:
            index = names.index(point.label)
            bars = _draw_point(axes, point, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
            if not point.is_hollow:
                handles[point.label] = bars
        label_axes(axes, title, *labels)
        _plain_log_axis(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


def _plain_log_axis(axes) -> None:
    """Few ticks with plain numbers, also where the axis spans less than a power of ten."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _draw_point(axes, point: Point, colour: str, marker: str):
    centre = (mean(point.x), mean(point.y))
    (x_below, x_above), (y_below, y_above) = (
        (middle - min(values), max(values) - middle) for middle, values in zip(centre, (point.x, point.y), strict=True)
    )
    return axes.errorbar(
        centre[0],
        centre[1],
        xerr=[[x_below], [x_above]],
        yerr=[[y_below], [y_above]],
        marker=marker,
        color=colour,
        markerfacecolor="none" if point.is_hollow else colour,
        linestyle="none",
        elinewidth=0.8,
        label=point.label,
    )


def sample_grid(
    columns: Mapping[str, Sequence[Image.Image]], row_labels: Sequence[str], *, cell: int = 96
) -> Image.Image:
    """Images side by side: one column per model, one row per prompt, with their names.

    Args:
        columns: Model name to one image per row.
        row_labels: The prompts.
        cell: Height of an image in the grid, in pixels; small images are enlarged without smoothing. All are of one
            shape, such as a clip's frames side by side.
    """
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    left = 10 + max(int(font.getlength(label)) for label in row_labels)
    top, gap = 34, 6
    first = next(iter(columns.values()))[0]
    cell_width = round(cell * first.width / first.height)
    width, height = left + len(columns) * (cell_width + gap), top + len(row_labels) * (cell + gap)
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(row_labels):
        draw.text((4, top + row * (cell + gap) + cell // 2 - 8), label, fill="black", font=font)
    for column, (name, images) in enumerate(columns.items()):
        x = left + column * (cell_width + gap)
        draw.multiline_text((x, 2), wrapped(name, cell_width, font), fill="black", font=font, spacing=1)
        for row, image in enumerate(images):
            grid.paste(image.resize((cell_width, cell), Image.Resampling.NEAREST), (x, top + row * (cell + gap)))
    return grid


def wrapped(text: str, width: int, font: Any) -> str:
    """`text` broken into lines that fit `width` pixels."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width or not lines[-1]:
            lines[-1] = candidate
        else:
            lines.append(word)
    return "\n".join(lines)
