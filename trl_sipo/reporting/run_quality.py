# SPDX-License-Identifier: Apache-2.0
"""Quality over steps: what `trl-sipo evaluate` measured of a run's checkpoints, and what the demo measured."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.reporting.run_files import Run
from trl_sipo.reporting.run_lines import as_number, file_inside, json_object

_LEVEL = 0.05  # of a corrected p-value
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
# Of the demo's records: what is a quality of samples, and what it is called.
_OF_DEMO = {
    "accuracy": "accuracy by the verifier",
    "second_accuracy": "accuracy by the second verifier",
    "frechet_distance": "Frechet distance",
    "diversity": "diversity",
}


@dataclass(frozen=True, order=True)
class Measured:
    """One number of a model of a run.

    Attributes:
        step: Of the model; 0 is the base.
        value, low, high: Estimate and interval; the same number where there is no interval.
        is_sure: Of a win rate whose interval leaves out one half: whether that outlasts the correction for how many
            comparisons were made.
    """

    step: int
    value: float
    low: float
    high: float
    is_sure: bool = field(default=True, compare=False)


@dataclass
class Quality:
    """Measures over steps.

    Attributes:
        measures: Measure -> run's name -> by step.
        win_rates: The same of win rates against the base.
        notes: Which models belong to no run.
    """

    measures: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)
    win_rates: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_quality(runs: Sequence[Run], evaluations: Sequence[Path]) -> Quality:
    """What is known of the quality of samples, beside what was logged.

    Args:
        evaluations: Output folders of `trl-sipo evaluate`.

    Raises:
        ConfigurationError: A folder is not there, or no such output.
        DatasetError: Its file is none.
    """
    quality = Quality()
    for run in runs:
        for record in run.demo_records:
            for key, name in _OF_DEMO.items():
                if (value := as_number(record.get(key))) is not None:
                    _add(quality.measures, name, run.name, Measured(record["step"], value, value, value))
    for folder in evaluations:
        _read_evaluation(folder, runs, quality)
    for part in (quality.measures, quality.win_rates):
        for by_run in part.values():
            for points in by_run.values():
                points.sort()
    return quality


def check_evaluations(evaluations: Sequence[Path]) -> None:
    """Raise [`ConfigurationError`] for a folder that is no output of `trl-sipo evaluate`."""
    for folder in evaluations:
        if file_inside(folder, "evaluation.json") is None:
            raise ConfigurationError(
                f"{str(folder)!r} holds no `evaluation.json`. `--evaluation` takes the `--output` of `trl-sipo "
                "evaluate`."
            )


def _read_evaluation(folder: Path, runs: Sequence[Run], quality: Quality) -> None:
    report = json_object(folder / "evaluation.json")
    base, rows, models = report.get("base"), report.get("metrics"), report.get("models")
    specs = [spec for spec in models if isinstance(spec, str)] if isinstance(models, list) else []
    owners = {spec.partition("=")[0]: _owner(spec.partition("=")[2], runs) for spec in specs}
    unknown = [name for name, owner in owners.items() if owner is None and name != base]
    if unknown:
        quality.notes.append(
            f"Of {folder.name}, no checkpoint of a run shown here: {', '.join(map(repr, unknown))}. A model "
            "belongs to a run by its path, such as `late=MODEL+RUN/checkpoint-200`."
        )
    of_base = sorted({owner[0].name for name, owner in owners.items() if owner is not None and name != base})
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or not isinstance(row.get("metric"), str):
            continue
        points = [(name, 0) for name in of_base] if row.get("model") == base else []
        if (owner := owners.get(row.get("model", ""))) is not None and row.get("model") != base:
            points = [(owner[0].name, owner[1])]
        for name, step in points:
            _add_interval(quality.measures, row["metric"], name, step, row.get("mean"))
            against = row.get("against_base")
            rate = against.get("win_rate") if isinstance(against, dict) else None
            corrected = as_number(row.get("corrected_win_p_value"))
            is_sure = corrected is None or corrected < _LEVEL
            _add_interval(quality.win_rates, f"win rate by {row['metric']}", name, step, rate, is_sure)


def _owner(path: str, runs: Sequence[Run]) -> tuple[Run, int] | None:
    """The run that a model is of, by its path, and its step; None of another model."""
    place = Path(path.rpartition("+")[2])
    match = _CHECKPOINT.fullmatch(place.name)
    folder = place.parent if match else place
    exact = [run for run in runs if run.folder.resolve() == folder.resolve()]
    # A run that was moved; where the folder is still there, it is another run of that name.
    alike = exact or [run for run in runs if run.folder.resolve().name == folder.name and not folder.is_dir()]
    if len(alike) != 1:
        return None
    return alike[0], int(match[1]) if match else alike[0].last_step


def _add_interval(
    table: dict[str, dict[str, list[Measured]]], measure: str, run: str, step: int, interval: Any, is_sure: bool = True
) -> None:
    found: Mapping[str, Any] = interval if isinstance(interval, dict) else {}
    value = as_number(found.get("estimate"))
    if value is None:
        return
    low, high = as_number(found.get("low")), as_number(found.get("high"))
    low, high = value if low is None else low, value if high is None else high
    _add(table, measure, run, Measured(step, value, low, high, is_sure))


def _add(table: dict[str, dict[str, list[Measured]]], measure: str, run: str, point: Measured) -> None:
    table.setdefault(measure[:120], {}).setdefault(run, []).append(point)
