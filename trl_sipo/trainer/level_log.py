# SPDX-License-Identifier: Apache-2.0
"""What is written down of each noise level: how errors, importance weights and margins move along the schedule.

A training log has the mean of a few draws from all levels, which are orders of magnitude apart. Here the draws since
the last log are told apart by equal parts of the schedule's time; an evaluation measures its levels exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.trainer import json_checks as checks
from trl_sipo.trainer.statistics import PairErrors

# Equal parts of the time 0..1 into which training draws fall: with 50 pairs per log a handful of pairs in each.
NUM_BINS = 20
# Name in the log -> name of the statistic of a pair.
_STATISTICS = {
    "importance_weight": "sipo/importance_weight",
    "masked": "sipo/masked_fraction",
    "margin": "rewards/margins",
}
_BINS = checks.items(checks.count(), NUM_BINS, NUM_BINS)
_SUMS = checks.items(checks.number(is_finite=False), NUM_BINS, NUM_BINS)
# What a state of the training draws must be.
LEVEL_SUMS = checks.record({"pairs": _BINS, "values": checks.table(checks.row(_BINS, _SUMS))})

MapTimes = Callable[[np.ndarray], np.ndarray]
"""Timesteps (n,) -> times (n,) in 0..1, or back; float64."""


def level_values(errors: PairErrors, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is kept of each sample beside its noise level, by name: detached float32 (batch,) each.

    What the method does not have is left out: a reference, importance weights, a second arm. What a single sample does
    not have is NaN: the rejected error of a liked one.

    Args:
        errors: Of policy and reference.
        statistics: As they are logged, of the same samples.
    """
    values = {name: statistics[logged] for name, logged in _STATISTICS.items() if logged in statistics}
    for arm in ("chosen", "rejected"):
        log_density = statistics.get(f"logps/{arm}")
        if log_density is None:
            continue
        values[f"{arm}_error"] = -2 * log_density
        # Samples of one arm, liked or not, are all in the first place.
        ref_error = errors.ref_chosen if errors.rejected is None else getattr(errors, f"ref_{arm}")
        if ref_error is not None:
            values[f"{arm}_ref_error"] = torch.where(log_density.isnan(), torch.nan, ref_error.detach().float())
    return values


class LevelSums:
    """Sums of values by noise level, from which means are taken.

    Args:
        num_levels: How many levels, or parts of the schedule, are told apart.
    """

    def __init__(self, num_levels: int):
        self._pairs = np.zeros(num_levels, np.int64)
        self._counts: dict[str, np.ndarray] = {}
        self._sums: dict[str, np.ndarray] = {}

    def add(self, level: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Count samples in.

        Args:
            level: Which of the levels each sample has, (n,) int.
            values: Of the samples by name, (n,) float64 each; NaN, of what a sample has not, does not count.
        """
        size = len(self._pairs)
        self._pairs += np.bincount(level, minlength=size)
        for name, column in values.items():
            has_value = ~np.isnan(column)
            of_level, column = level[has_value], column[has_value]
            counts = self._counts.setdefault(name, np.zeros(size, np.int64))
            counts += np.bincount(of_level, minlength=size)
            sums = self._sums.setdefault(name, np.zeros(size))
            sums += np.bincount(of_level, column, minlength=size)

    def means(self) -> list[dict[str, float]]:
        """Per level the number of `pairs` and the mean of every value that one of them has."""
        return [
            {
                "pairs": int(pairs),
                **{
                    name: float(self._sums[name][level] / counts[level])
                    for name, counts in self._counts.items()
                    if counts[level]
                },
            }
            for level, pairs in enumerate(self._pairs)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Of every value its counts and its sums, of values that JSON can hold."""
        values = {name: [counts.tolist(), self._sums[name].tolist()] for name, counts in self._counts.items()}
        return {"pairs": self._pairs.tolist(), "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what [`state_dict`] gave."""
        self._pairs = np.array(state["pairs"], np.int64)
        self._counts = {name: np.array(counts, np.int64) for name, (counts, _) in state["values"].items()}
        self._sums = {name: np.array(sums, np.float64) for name, (_, sums) in state["values"].items()}


class LevelLog:
    """Collects what training and evaluation show of the noise levels, until a line of the log is due.

    Args:
        times_of: From the timesteps of levels to their times.
        timesteps_of: Back.
    """

    def __init__(self, times_of: MapTimes, timesteps_of: MapTimes):
        self._times_of, self._timesteps_of = times_of, timesteps_of
        self.training = LevelSums(NUM_BINS)
        self._evaluated: LevelSums | None = None
        self._levels: list[dict[str, float]] = []
        self._split: str | None = None

    def add_training(self, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        """Count the pairs of a micro-batch.

        Args:
            names: Of the columns after the first, which is the timestep.
            rows: One per pair.
        """
        timestep, *columns = np.array(rows, np.float64).T
        level = np.floor(self._times_of(timestep) * NUM_BINS).astype(np.int64).clip(0, NUM_BINS - 1)
        self.training.add(level, dict(zip(names, columns, strict=True)))

    def begin_training(self) -> None:
        """Forget the draws of an earlier run."""
        self.training = LevelSums(NUM_BINS)

    def begin_evaluation(self, split: str) -> None:
        """Forget the evaluation before.

        Args:
            split: The prefix of its metrics.
        """
        self._split, self._evaluated, self._levels = split, None, []

    def add_evaluation(
        self, levels: Mapping[float, NoiseLevel], names: Sequence[str], rows: Sequence[Sequence[float]]
    ) -> None:
        """Count pairs of an evaluation, which are measured at every level.

        Args:
            levels: Time to level (1,).
            names: Of the values.
            rows: Of each pair the values at the first level, then at the next, and so on.
        """
        if self._evaluated is None:
            self._evaluated = LevelSums(len(levels))
            self._levels = [{"time": time, "timestep": float(level.timestep)} for time, level in levels.items()]
        values = np.array(rows, np.float64).reshape(len(rows), len(levels), len(names))
        for position in range(len(levels)):
            columns = dict(zip(names, values[:, position].T, strict=True))
            self._evaluated.add(np.full(len(rows), position), columns)

    def take(self, logged: Mapping[str, Any], step: int) -> Iterator[dict[str, Any]]:
        """The lines that belong to a row of the log, at most one; what they are made of begins anew.

        Args:
            logged: The row.
            step: Of the run.
        """
        if "loss" in logged:
            yield {"step": step, "split": "train", **self._training_line()}
            self.begin_training()
        if self._evaluated is not None and f"{self._split}_loss" in logged:
            levels = [level | means for level, means in zip(self._levels, self._evaluated.means(), strict=True)]
            yield {"step": step, "split": self._split, "levels": levels}
            self._evaluated = None

    def _training_line(self) -> dict[str, Any]:
        edges = np.arange(NUM_BINS + 1) / NUM_BINS
        middles = (2 * np.arange(NUM_BINS) + 1) / (2 * NUM_BINS)
        bins = zip(middles, self._timesteps_of(middles), self.training.means(), strict=True)
        levels = [{"time": float(time), "timestep": float(step)} | means for time, step, means in bins]
        return {"edges": edges.tolist(), "levels": [level for level in levels if level["pairs"]]}
