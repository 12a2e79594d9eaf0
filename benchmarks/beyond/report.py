# SPDX-License-Identifier: Apache-2.0
"""The files of the report: results as JSON, and the figures; the tables are in `tables.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beyond.analysis import Areas
from beyond.area import PRIMARY
from beyond.figures import area_figure, frontier_figure, long_figure
from beyond.protocol import CANDIDATES, MAIN_CELLS
from beyond.tables import reported

#: Methods of a figure, and the cells that it is of: the main ones, the others, or those with a candidate.
FIGURES: Mapping[str, tuple[str, Sequence[str]]] = {
    "frontier": ("main", ("DPO", "DPO, stopped by reward", "SIPO", "proximal", "SFT", "KTO")),
    "more_cells": ("more", ("DPO", "DPO, stopped by reward", "SIPO", "proximal", "SFT", "KTO")),
    "candidates": (
        "candidates",
        ("proximal", "kappa schedule", "kappa by level", "winner anchor", "loser anchor", "moving reference"),
    ),
    "rounds_and_masks": (
        "candidates",
        ("DPO", "SIPO", "proximal", "SIPO + proximal", "soft trust region", "rounds", "DPO in rounds"),
    ),
}
DPI = 110
LONG_MEASURES = {
    "win_rate": "win rate over the base",
    "frechet_distance": "Frechet distance",
    "diversity": "diversity",
}


def draw_all(areas: Areas, result: Mapping[str, Any], folder: Path) -> list[Path]:
    """The figures of what is there: frontiers, areas over the main cells, and the long runs."""
    main = [cell for cell in areas.points if cell in MAIN_CELLS]
    cells = {
        "main": main,
        "more": [cell for cell in areas.points if cell not in main],
        "candidates": [cell for cell, methods in areas.points.items() if set(CANDIDATES) & set(methods)],
    }
    written = []
    for name, (group, methods) in FIGURES.items():
        shown = [method for method in methods if any(method in areas.points[cell] for cell in cells[group])]
        if shown:
            written.append(folder / f"{name}.png")
            frontier_figure(areas, cells[group], shown).savefig(written[-1], dpi=DPI)
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
