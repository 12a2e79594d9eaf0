# SPDX-License-Identifier: Apache-2.0
"""What a method measured in a cell: policies by seeds, and the policies that stopping early leaves of each run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from beyond.area import MEASURES

#: How a run may be stopped without the verifier that measures: name -> column of a row, and its sign where more is
#: better. The held-out loss is the method's own, with all its terms; the reward is of samples, by the verifier that
#: ranked the pairs.
STOPPING = {"stopped by loss": ("held_out_loss", -1.0), "stopped by reward": ("reward", 1.0)}


@dataclass(frozen=True)
class Points:
    """Policies of one method in one cell.

    Attributes:
        policies: (setting, step) of each; the step is 0 where every run has its own.
        seeds: Those that every setting of the method was trained with.
        values: (policies, seeds, 4): `area.MEASURES`.
    """

    policies: tuple[tuple[str, int], ...]
    seeds: tuple[int, ...]
    values: np.ndarray

    def of_seeds(self, seeds: Sequence[int]) -> "Points":
        """The same policies with some of the seeds, in that order."""
        return Points(self.policies, tuple(seeds), self.values[:, [self.seeds.index(seed) for seed in seeds]])

    @property
    def means(self) -> np.ndarray:
        """Over seeds, (policies, 4)."""
        return self.values.mean(axis=1)


Row = Mapping[str, Any]


def by_run(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    """Setting -> seed -> the measurements of that run, in the order of their steps."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["setting"], {}).setdefault(row["seed"], []).append(row)
    return {
        setting: {seed: sorted(run, key=lambda row: row["step"]) for seed, run in runs.items()}
        for setting, runs in found.items()
    }


def points_of(rows: Iterable[Row]) -> Points | None:
    """The policies of one method in one cell, each measurement one; None where no seed has all settings.

    Args:
        rows: Of this method and cell, as `runs.rows_of` gives them.
    """
    runs = by_run(rows)
    seeds = _common_seeds(runs)
    if not seeds:
        return None
    policies = [(setting, row["step"]) for setting, by_seed in runs.items() for row in by_seed[seeds[0]]]
    values = [[_measures_at(runs[setting][seed], step) for seed in seeds] for setting, step in policies]
    return Points(tuple(policies), seeds, np.array(values, dtype=np.float64))


def stopped_early(rows: Iterable[Row], criterion: str) -> Points | None:
    """The policies of one method in one cell if every run ends where its own criterion is best: one per setting.

    Args:
        rows: Of this method and cell.
        criterion: Key of `STOPPING`. A value that is no number is never the best.
    """
    runs = by_run(rows)
    seeds = _common_seeds(runs)
    if not seeds:
        return None
    stops = [[_measures(best_of(runs[setting][seed], criterion)) for seed in seeds] for setting in runs]
    return Points(tuple((setting, 0) for setting in runs), seeds, np.array(stops, dtype=np.float64))


def best_of(run: Sequence[Row], criterion: str) -> Row:
    """The measurement of a run at which it is stopped; the earliest of equals."""
    name, sign = STOPPING[criterion]
    return max(run, key=lambda row: np.nan_to_num(sign * row[name], nan=-np.inf))


def _common_seeds(runs: Mapping[str, Mapping[int, Any]]) -> tuple[int, ...]:
    return tuple(sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))) if runs else ()


def _measures_at(run: Sequence[Row], step: int) -> list[float]:
    return _measures(next(row for row in run if row["step"] == step))


def _measures(row: Row) -> list[float]:
    return [row[name] for name in MEASURES]
