# SPDX-License-Identifier: Apache-2.0
"""From rows to what is claimed: areas of methods by cell and over cells, differences, and what one setting gives.

A method beside those that were trained is "DPO, stopped by loss": the same runs, each ended where its own criterion
says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from beyond import protocol
from beyond.area import COLLAPSED, MEASURES, PRIMARY, QUALITIES, on_frontier, on_plane
from beyond.evidence import Evidence
from beyond.inference import Estimate, Resampled, mean_of, plain_area, resampled_area
from beyond.points import STOPPING, Points, by_run, points_of, stopped_early
from beyond.protocol import MAIN_CELLS, Cell
from beyond.selection import Measured

from trl_sipo.evaluation.statistics import holm

#: What every method is compared with, as far as it is there.
REFERENCES = ("DPO", *(f"DPO, {criterion}" for criterion in STOPPING), "SIPO", "proximal", "DPO in rounds")


class Areas:
    """Points and cross-fitted areas of all methods in all cells; each area is computed once.

    Attributes:
        points: Cell -> method -> its policies, of those that were stopped early too.
        bases: Measures of the bases.
        trained: The methods without those that are stopped early.
    """

    def __init__(self, evidence: Evidence, seeds: Sequence[int]) -> None:
        self.bases = evidence.bases
        self.rows = evidence.by_cell(seeds)
        self.trained = list(dict.fromkeys(method for methods in self.rows.values() for method in methods))
        self.points = {cell: _all_points(methods) for cell, methods in self.rows.items()}
        self._areas: dict[Any, Resampled] = {}

    @property
    def methods(self) -> list[str]:
        """All, those that are stopped early beside the one that is."""
        every = [[method, *(f"{method}, {criterion}" for criterion in STOPPING)] for method in self.trained]
        return [name for names in every for name in names if any(name in found for found in self.points.values())]

    def measured(self, cell: Cell, method: str) -> Measured:
        """Policies and base."""
        return self.points[cell][method], self.bases[cell.base]

    def area(self, cell: Cell, method: str, quality: str, seeds: Sequence[int] | None = None) -> Resampled:
        """Cross-fitted, of all seeds of the method or of some."""
        points, base = self.measured(cell, method)
        seeds = tuple(seeds or points.seeds)
        key = (cell, method, quality, seeds)
        if key not in self._areas:
            self._areas[key] = resampled_area(points.of_seeds(seeds), base, quality)
        return self._areas[key]

    def difference(self, cell: Cell, first: str, second: str, quality: str) -> Resampled | None:
        """Area of the first method minus that of the second, paired by seed; None where they share none."""
        both = [self.points[cell][method].seeds for method in (first, second)]
        seeds = sorted(set(both[0]) & set(both[1]))
        if not seeds:
            return None
        return self.area(cell, first, quality, seeds).minus(self.area(cell, second, quality, seeds))


def _all_points(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Points]:
    found = {}
    for method, rows in methods.items():
        found[method] = points_of(rows)
        found |= {f"{method}, {criterion}": stopped_early(rows, criterion) for criterion in STOPPING}
    return {name: points for name, points in found.items() if points is not None}


def analysed(evidence: Evidence, seeds: Sequence[int], single: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All results, as `frontier.json` has them.

    Args:
        evidence: Records of runs.
        seeds: Those of the test.
        single: Method -> "at the end", "at any step" -> (setting, step), from tuning.
    """
    areas = Areas(evidence, seeds)
    return {
        "cells": {cell.name: _cell(areas, cell) for cell in areas.points},
        "over_cells": {quality: over_cells(areas, quality) for quality in QUALITIES},
        "single": {method: _single(areas, method, policies) for method, policies in single.items()},
        "long": long_runs(evidence),
        "missing": list(evidence.missing),
    }


def long_runs(evidence: Evidence) -> dict[str, Any]:
    """Cell -> "method, setting" -> steps and, by seed, what is drawn: (seeds, steps) of each measure."""
    found: dict[str, Any] = {}
    for cell, methods in evidence.by_cell(protocol.LONG_SEEDS, is_long=True).items():
        for method, rows in methods.items():
            for setting, runs in by_run(rows).items():
                steps = [row["step"] for row in next(iter(runs.values()))]
                values = {name: [[row[name] for row in run] for run in runs.values()] for name in MEASURES}
                found.setdefault(cell.name, {})[f"{method}, {setting}"] = {"steps": steps, **values}
    return found


def _cell(areas: Areas, cell: Cell) -> dict[str, Any]:
    methods = {}
    for method in areas.methods:
        if method not in areas.points[cell]:
            continue
        points, base = areas.measured(cell, method)
        methods[method] = {
            "seeds": list(points.seeds),
            "settings": len({setting for setting, _ in points.policies}),
            "policies": len(points.policies),
            "area": {quality: _areas_of(areas, cell, method, quality) for quality in QUALITIES},
            "frontier": frontier_of(points, base),
            **({"collapsed": collapsed(areas.rows[cell][method], base)} if method in areas.trained else {}),
        }
    return {"is_main": cell in MAIN_CELLS, "base": dict(areas.bases[cell.base]), "methods": methods}


def _areas_of(areas: Areas, cell: Cell, method: str, quality: str) -> dict[str, Any]:
    points, base = areas.measured(cell, method)
    plain = plain_area(points, base, np.ones((1, len(points.seeds))), quality)
    return {**areas.area(cell, method, quality).estimate.as_record(), "plain": float(plain[0])}


def frontier_of(points: Points, base: Mapping[str, float]) -> list[dict[str, Any]]:
    """The policies on a method's frontier in the primary quality, the strongest last: setting, step, and means."""
    is_on = on_frontier(on_plane(points.means, base))
    found = [
        {"setting": setting, "step": step, **dict(zip(MEASURES, means.tolist(), strict=True))}
        for (setting, step), means, on in zip(points.policies, points.means, is_on, strict=True)
        if on
    ]
    return sorted(found, key=lambda policy: policy["win_rate"])


def collapsed(rows: Sequence[Mapping[str, Any]], base: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """How many runs of each setting end with a Frechet distance beyond `COLLAPSED` times the base's, or with none."""
    limit = COLLAPSED * base["frechet_distance"]
    last = {setting: [run[-1]["frechet_distance"] for run in runs.values()] for setting, runs in by_run(rows).items()}
    return {
        setting: {"count": sum(not distance <= limit for distance in distances), "of": len(distances)}
        for setting, distances in last.items()
    }


def over_cells(areas: Areas, quality: str) -> dict[str, Any]:
    """Means over the main cells that a method was made in: areas, and differences from each reference.

    P-values are Holm-corrected over the trained methods that are compared with one reference.
    """
    main = [cell for cell in areas.points if cell in MAIN_CELLS]
    methods = {}
    for method in areas.methods:
        found = {cell: areas.area(cell, method, quality).estimate for cell in main if method in areas.points[cell]}
        if found:
            methods[method] = _over_bases(found)
    differences = {}
    for reference in REFERENCES:
        rows = {
            method: _difference_over_cells(areas, main, method, reference, quality)
            for method in areas.trained
            if method != reference
        }
        differences[reference] = _with_holm({method: row for method, row in rows.items() if row is not None})
    return {"methods": methods, "differences": differences}


def _difference_over_cells(
    areas: Areas, cells: Sequence[Cell], method: str, reference: str, quality: str
) -> dict[str, Any] | None:
    both = [cell for cell in cells if {method, reference} <= set(areas.points[cell])]
    found = {cell: areas.difference(cell, method, reference, quality) for cell in both}
    estimates = {cell: one.estimate for cell, one in found.items() if one is not None}
    return {**_over_bases(estimates, low=-1.0), "p": mean_of(list(estimates.values())).p} if estimates else None


def _over_bases(found: Mapping[Cell, Estimate], low: float = 0.0) -> dict[str, Any]:
    """The mean over cells, and that over the cells of each base."""
    bases = dict.fromkeys(cell.base for cell in found)
    by_base = {base: mean_of([one for cell, one in found.items() if cell.base == base]) for base in bases}
    return {
        **mean_of(list(found.values())).as_record(low),
        "cells": len(found),
        "by_base": {base: one.as_record(low) for base, one in by_base.items()},
    }


def _with_holm(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    tested = [row for row in rows.values() if row["p"] is not None]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    return dict(rows)


def _single(areas: Areas, method: str, policies: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {when: _everywhere(areas, method, *policy) for when, policy in policies.items()}


def _everywhere(areas: Areas, method: str, setting: str, step: int) -> dict[str, Any]:
    """What one (setting, step) gives in every cell of the test: win rate, Frechet distance over the base's, area."""
    cells = {}
    for cell, methods in areas.points.items():
        if method not in methods or (setting, step) not in methods[method].policies:
            continue
        points, base = areas.measured(cell, method)
        means = points.means[points.policies.index((setting, step))]
        measures = dict(zip(MEASURES, means.tolist(), strict=True))
        cells[cell.name] = {
            "win_rate": measures["win_rate"],
            "frechet_ratio": measures["frechet_distance"] / base["frechet_distance"],
            "diversity_ratio": measures["diversity"] / base["diversity"],
            "area": float(on_plane(means, base, PRIMARY).prod()),
        }
    extremes = {"win_rate": min, "frechet_ratio": max, "diversity_ratio": min, "area": min}
    columns = {name: [row[name] for row in cells.values()] for name in extremes}
    return {
        "setting": setting,
        "step": step,
        "mean": {name: float(np.mean(values)) for name, values in columns.items()} if cells else None,
        "worst": {name: extremes[name](values) for name, values in columns.items()} if cells else None,
        "cells": cells,
    }
