# SPDX-License-Identifier: Apache-2.0
"""The evidence: what all runs measured, in one file from which the report is computed anew without training."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from beyond import protocol
from beyond.plan import QUICK_LONG_MEASURED_AT
from beyond.protocol import Arm, Cell
from beyond.runs import Place, Run, read_json, rows_of

from trl_sipo.errors import ConfigurationError

#: Of the file.
NAME = "runs.json"
#: The base's measures that are kept.
BASE_MEASURES = ("accuracy", "second_accuracy", "reward", "frechet_distance", "diversity")
#: Digits that are kept; the next are beyond what a run tells.
DIGITS = 6


@dataclass(frozen=True)
class Evidence:
    """Records of runs, and the measures of their bases.

    Attributes:
        bases: Name -> measure -> value.
        records: As `runs.make` writes them, with "is_long" in place of the steps.
        missing: Names of the runs that were asked for and are not there.
        protocol: Digest of the frozen protocol that the runs are of; of a headline's none.
    """

    bases: Mapping[str, Mapping[str, float]]
    records: Sequence[Mapping[str, Any]]
    missing: Sequence[str] = ()
    protocol: str = ""

    @property
    def of_the_test(self) -> list[Mapping[str, Any]]:
        """Records of test seeds."""
        return [record for record in self.records if record["run"]["seed"] in protocol.TEST_SEEDS]

    def of_arms(self, arms: Iterable[Arm]) -> "Evidence":
        """Of the runs of the test those of some arms; the long ones and those of tuning as they are."""
        known = {(arm.method, arm.label) for arm in arms}

        def is_kept(run: Mapping[str, Any]) -> bool:
            is_other = run["is_long"] or run["seed"] not in protocol.TEST_SEEDS
            return is_other or (run["arm"]["method"], run["arm"]["label"]) in known

        return replace(self, records=[record for record in self.records if is_kept(record["run"])])

    def by_cell(self, seeds: Iterable[int], *, is_long: bool = False) -> dict[Cell, dict[str, list[dict[str, Any]]]]:
        """Cell -> method -> rows, of some seeds, in the order of the records; of the long runs alone, or without."""
        wanted, found = set(seeds), {}
        for record in self.records:
            run = record["run"]
            if run["seed"] in wanted and run["is_long"] == is_long:
                methods = found.setdefault(Cell(**run["cell"]), {})
                methods.setdefault(run["arm"]["method"], []).extend(rows_of([record]))
        return found


def collect(runs: Iterable[Run], place: Place) -> Evidence:
    """What is there of some runs, and what is missing, as `cell, method, setting, seed, steps`.

    Raises:
        ConfigurationError: A record is no whole JSON.
    """
    records, missing = [], []
    for run in runs:
        if place.has(run):
            records.append(_kept(read_json(place.result(run)), run))
        else:
            why = " (its record is of other shared settings)" if place.result(run).is_file() else ""
            steps = f"{run.measured_at[-1]} steps{why}"
            missing.append(f"{run.cell.name}: {run.arm.method}, {run.arm.label}, seed {run.seed}, {steps}")
    names = dict.fromkeys(record["run"]["cell"]["base"] for record in records)
    bases = {}
    for name in names:
        measures = place.base_record(name)
        bases[name] = {measure: _short(measures[measure]) for measure in BASE_MEASURES}
    return Evidence(bases, records, missing)


def write(evidence: Evidence, path: Path) -> None:
    """One line per run, complete or not at all. What is no number is written as null."""
    columns = list(dict.fromkeys(name for record in evidence.records for row in record["rows"] for name in row))
    arms, cells = [], []
    lines = []
    for record in evidence.records:
        run = record["run"]
        for known, one in ((arms, run["arm"]), (cells, run["cell"])):
            if one not in known:
                known.append(one)
        about = [cells.index(run["cell"]), arms.index(run["arm"]), run["seed"], run["is_long"], record["seconds"]]
        rows = [[_or_null(row.get(name)) for name in columns] for row in record["rows"]]
        lines.append(json.dumps([*about, rows], separators=(",", ":")))
    parts = {
        "protocol": evidence.protocol,
        "bases": evidence.bases,
        "cells": cells,
        "arms": arms,
        "columns": columns,
        "missing": evidence.missing,
    }
    head = ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in parts.items())
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{" + head + ',\n"runs": [\n' + ",\n".join(lines) + "\n]}\n")
    temporary.replace(path)


def read(path: Path) -> Evidence:
    """The evidence as it was written.

    Raises:
        ConfigurationError: No such file, or it is none of `write`'s.
    """
    if not path.is_file():
        raise ConfigurationError(f"--evidence {path}: no such file.")
    try:
        content = json.loads(path.read_text())
        cells = [asdict(Cell(**cell)) for cell in content["cells"]]
        records = [
            {
                "run": {"cell": cells[cell], "arm": content["arms"][arm], "seed": seed, "is_long": is_long},
                "rows": [_row(content["columns"], values) for values in rows],
                "seconds": seconds,
            }
            for cell, arm, seed, is_long, seconds, rows in content["runs"]
        ]
        bases = {
            name: {measure: content["bases"][name][measure] for measure in BASE_MEASURES} for name in content["bases"]
        }
        absent = {record["run"]["cell"]["base"] for record in records} - set(bases)
        if absent:
            raise ValueError(f"no measures of the base {', '.join(sorted(absent))}")
        return Evidence(bases, records, content["missing"], content["protocol"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        message = (
            f"{path} is no evidence of this command ({error!r}): take it from where it came from, or make it anew "
            "from the runs, by `python benchmarks/frontier.py report`."
        )
        raise ConfigurationError(message) from error


def _row(columns: Sequence[str], values: Sequence[float | None]) -> dict[str, float]:
    """A measurement; what its method does not have is left out, what was no number is one that is none."""
    row = {}
    for name, value in zip(columns, values, strict=True):
        if value != ABSENT:
            row[name] = math.nan if value is None else value
    return row


#: In place of a measure that a method does not have, such as the masked share of one without a mask.
ABSENT = ""


def _or_null(value: float | None) -> float | str | None:
    if value is None:
        return ABSENT
    return value if math.isfinite(value) else None


def _kept(record: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """A record without its values per image, rounded."""
    rows = [{name: _short(row[name]) for name in row if not isinstance(row[name], list)} for row in record["rows"]]
    about = {name: record["run"][name] for name in ("cell", "arm", "seed")}
    about["is_long"] = run.measured_at in (protocol.LONG_MEASURED_AT, QUICK_LONG_MEASURED_AT)
    return {"run": about, "rows": rows, "seconds": record["seconds"]}


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")
