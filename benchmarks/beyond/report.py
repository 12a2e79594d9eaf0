# SPDX-License-Identifier: Apache-2.0
"""The files of the report: results as JSON, and the figures; the tables are in `tables.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beyond.analysis import Areas
from beyond.area import PRIMARY
from beyond.figures import area_figure, frontier_figure, long_figure
from beyond.protocol import Arm
from beyond.tables import reported

#: Beside the methods that were trained, in the first figure.
STOPPED = ("DPO, stopped by reward",)
#: Drawn in the figure of the candidates, to see them against.
PARENTS = ("SIPO", "proximal")
DPI = 110
LONG_MEASURES = {
    "win_rate": "win rate over the base",
    "frechet_distance": "Frechet distance",
    "diversity": "diversity",
}


def is_candidate(arms: Sequence[Arm], method: str) -> bool:
    """Whether a method is an experiment and not one of the library."""
    return any(arm.method == method and (arm.candidate or arm.rounds > 1) for arm in arms)


def draw_all(areas: Areas, arms: Sequence[Arm], result: Mapping[str, Any], folder: Path) -> list[Path]:
    """The figures: methods and candidates in the main cells, methods in the others, and the areas."""
    candidates = [method for method in areas.trained if is_candidate(arms, method)]
    methods = [method for method in areas.trained if method not in candidates]
    methods = [name for method in methods for name in (method, *(s for s in STOPPED if s.startswith(f"{method},")))]
    main = [cell for cell in areas.points if result["cells"][cell.name]["is_main"]]
    more = [cell for cell in areas.points if cell not in main]
    parts = {
        "frontier": (main, methods),
        "candidates": (main, [method for method in PARENTS if method in areas.trained] + candidates),
        "more_cells": (more, methods),
    }
    written = []
    for name, (cells, shown) in parts.items():
        if cells and shown:
            written.append(folder / f"{name}.png")
            frontier_figure(areas, cells, shown).savefig(written[-1], dpi=DPI)
    over = result["over_cells"][PRIMARY]["methods"]
    if over:
        written.append(folder / "areas.png")
        area_figure({name: over[name] for name in reported(over)}).savefig(written[-1], dpi=DPI)
    if result["long"]:
        written.append(folder / "long.png")
        long_figure(result["long"], LONG_MEASURES).savefig(written[-1], dpi=DPI)
    return written


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Numbers of four significant digits, all or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_short(content), indent=1) + "\n")
    temporary.replace(path)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, (list, tuple)) else value
