# SPDX-License-Identifier: Apache-2.0
"""The figure of `trl-sipo audit cost`: what a step holds beside what GPUs have, and how long the run takes on each."""

from collections.abc import Mapping
from typing import Any

from trl_sipo.reporting.figures import COLOURS, label_axes, new_figure

_SMALLEST = 0.05  # GiB of a part that is drawn
_HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo", "**")


def cost_figure(
    memory: Mapping[str, float], rooms: Mapping[str, float], hours: Mapping[str, tuple[float, float]]
) -> Any:
    """Two panels.

    Args:
        memory: Part of a step's memory -> GiB.
        rooms: Device -> GiB that it has.
        hours: Device -> shortest and longest time of the run; devices that cannot run it are left out.
    """
    figure = new_figure(figsize=(10.5, max(3.2, 0.32 * len(rooms) + 1.6)))
    left, right = figure.subplots(1, 2, sharey=False)
    _memory_panel(left, {name: size for name, size in memory.items() if size >= _SMALLEST}, rooms)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8, title="needed, in GiB")
    unit, scale = ("hours", 1) if max((high for _, high in hours.values()), default=0) >= 1 else ("minutes", 60)
    names = list(hours)
    for place, name in enumerate(names):
        low, high = (scale * value for value in hours[name])
        right.barh(place, high - low, left=low, height=0.55, color=COLOURS[0])
        right.text(high, place, f"  {low:.3g} to {high:.3g}", va="center", fontsize=8)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    if names:
        right.set_xlim(0, 1.35 * scale * max(high for _, high in hours.values()))
    label_axes(right, "Time of the run, if a device is used well and if badly", unit, "")
    return figure


def _memory_panel(axes: Any, memory: Mapping[str, float], rooms: Mapping[str, float]) -> None:
    """One bar for what is needed, in parts, and one for what each device has."""
    names = ["needed", *rooms]
    start = 0.0
    for index, (part, size) in enumerate(memory.items()):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "hatch": _HATCHES[index % len(_HATCHES)],
            "edgecolor": "white",
        }
        axes.barh(0, size, left=start, height=0.7, label=f"{part}: {size:.1f}", **style)
        start += size
    for place, size in enumerate(rooms.values(), start=1):
        axes.barh(place, size, height=0.45, color="#999999" if size < start else COLOURS[2])
        axes.text(size, place, "  too small" if size < start else "  fits", va="center", fontsize=8)
    axes.axvline(start, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(start, *rooms.values()))
    label_axes(axes, "Memory at the peak of a step", "GiB", "")
