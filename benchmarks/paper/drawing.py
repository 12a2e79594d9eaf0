# SPDX-License-Identifier: Apache-2.0
"""Figures of the paper's questions: measures over steps, and over a value that is swept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sipo.reporting.figures import Series, quality_figure

TITLES = {
    "second_accuracy": "accuracy, second verifier",
    "frechet_distance": "Frechet distance",
    "diversity": "diversity",
    "held_out_accuracies": "implicit accuracy, held out",
    "held_out_chosen": "winner's reward, held out",
    "held_out_rejected": "loser's reward, held out",
    "held_out_margins": "margin of rewards, held out",
    "held_out_chosen_error": "rise of the winner's error",
    "masked_share": "masked share of training pairs",
}
DPI = 110


def over_steps(result: Mapping[str, Any], labels: Sequence[str], measures: Sequence[str], path: Path) -> None:
    """One panel per measure, one line per arm; the first point is the base's where it has the measure."""
    panels = {}
    for measure in measures:
        start = result["base"].get(measure)
        lines = []
        for label in labels:
            curves = result["arms"][label]["curves"]
            if measure == "masked_share":
                lines.append(masked(label, result["arms"][label]["log"]))
            elif measure in curves:
                first = [] if start is None else [start]
                steps = [*([0] if first else []), *curves["steps"]]
                lines.append(Series(label, steps, [[*first, *values] for values in curves[measure]]))
        panels[TITLES[measure]] = lines
    quality_figure(panels).savefig(path, dpi=DPI)


def masked(label: str, logs: Sequence[Sequence[Mapping[str, float]]]) -> Series:
    """The share of masked pairs as it was logged, which is closer than measurements are; one log per seed."""
    steps = [row["step"] for row in logs[0]]
    return Series(label, steps, [[row["sipo/masked_fraction"] for row in log] for log in logs])


def over_values(
    result: Mapping[str, Any],
    lines: Mapping[str, Mapping[float, str]],
    measures: Sequence[str],
    path: Path,
    *,
    x_label: str,
    x_scale: str = "linear",
) -> None:
    """One panel per measure, the value at the last step over what is swept.

    Args:
        lines: Name of a line -> swept value -> label of the arm.
    """
    panels = {}
    for measure in measures:
        panels[TITLES[measure]] = [
            Series(name, list(points), _by_seed(result, list(points.values()), measure))
            for name, points in lines.items()
        ]
        if measure in result["base"]:
            values = list(next(iter(lines.values())))
            panels[TITLES[measure]].append(Series("base model", values, [[result["base"][measure]] * len(values)]))
    quality_figure(panels, x_label=x_label, x_scale=x_scale).savefig(path, dpi=DPI)


def _by_seed(result: Mapping[str, Any], labels: Sequence[str], measure: str) -> list[list[float]]:
    columns = [result["arms"][label]["final"][measure]["values"] for label in labels]
    return [list(row) for row in zip(*columns, strict=True)]
