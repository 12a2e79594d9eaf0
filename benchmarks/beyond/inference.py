# SPDX-License-Identifier: Apache-2.0
"""How sure areas are: cross-fitting against the choice of the frontier, and a bootstrap over training seeds.

The frontier is chosen among many measured policies, so that on the same seeds it is the luckier the more policies a
method has. A cross-fitted area takes the policies that are on the frontier of one half of the seeds, and measures
their area on the other half; it is the mean over all halves, each once for choosing and once for measuring. Which
policy lies above another within the half that measures is still decided by that half: a small part of the luck stays.

Seeds are few, and the percentiles of a bootstrap are then too narrow. The bootstrap gives the standard error, times
what makes it right for a mean (`inflation`), and Student's t the interval. Cells are independent of each
other, so that the squares of their errors add up, with Satterthwaite's (1946) degrees of freedom.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from beyond.area import PRIMARY, Quality, dominated_area, on_frontier, on_plane
from beyond.points import Points
from scipy.stats import t as student

NUM_DRAWS, DRAWING_SEED, LEVEL = 2000, 0, 0.95
#: Of fewer seeds no spread is told.
MIN_SEEDS = 3


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error over seeds.

    Attributes:
        value: The estimate.
        error: Standard error; None of too few seeds.
        degrees: Of freedom of the error.
    """

    value: float
    error: float | None = None
    degrees: float = 0.0

    def as_record(self, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
        """Value and interval, cut at what is possible; None for its ends where the seeds do not differ or are few."""
        if not self.error:
            return {"value": self.value, "low": None, "high": None}
        half = float(student.ppf((1 + LEVEL) / 2, self.degrees)) * self.error
        return {"value": self.value, "low": max(low, self.value - half), "high": min(high, self.value + half)}

    @property
    def p(self) -> float | None:
        """Two-sided p-value of "it is 0"; None without an error."""
        return float(2 * student.sf(abs(self.value) / self.error, self.degrees)) if self.error else None


def draws_of(num_seeds: int) -> np.ndarray:
    """How often each seed comes in each resample, (draws, seeds); the same for all that have as many seeds.

    A resample of one seed alone is not counted: it has no two halves.
    """
    generator = np.random.default_rng(DRAWING_SEED)
    counts = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=NUM_DRAWS)
    return counts[(counts > 0).sum(axis=1) > 1]


def plain_area(
    points: Points, base: Mapping[str, float], counts: np.ndarray, quality: Quality = PRIMARY
) -> np.ndarray:
    """Area of the policies' means over seeds, chosen and measured on the same; (draws,).

    Args:
        points: Policies.
        base: The base's measures.
        counts: (draws, seeds): how often each seed counts.
        quality: What is the height, as `area.on_plane` takes it.
    """
    return dominated_area(on_plane(_means(points.values, counts), base, quality))


def crossfit_area(
    points: Points, base: Mapping[str, float], counts: np.ndarray, quality: Quality = PRIMARY
) -> np.ndarray:
    """Area of the policies that the other half of the seeds puts on the frontier; (draws,).

    The halves are of the seeds as they are, so that no resample has one seed in both; halves that a resample leaves
    empty are passed over. The arguments are those of `plain_area`, with two seeds or more that count in each draw.
    """
    total, number = np.zeros(len(counts)), np.zeros(len(counts))
    for first, is_whole in _halves(counts):
        planes = [
            on_plane(_means(points.values[:, part], counts[is_whole][:, part]), base, quality)
            for part in (first, ~first)
        ]
        for chosen_on, measured_on in (planes, planes[::-1]):
            kept = measured_on * on_frontier(chosen_on)[..., None]
            total[is_whole] += dominated_area(kept)
            number[is_whole] += 1
    return total / number


def _means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weighted means over seeds; (draws, policies, measures)."""
    return np.einsum("psm,ds->dpm", values, counts / counts.sum(axis=1, keepdims=True))


@lru_cache
def inflation(num_seeds: int) -> float:
    """How much the standard error of a mean is larger than the spread of its cross-fitted resamples, in expectation.

    A resample gives each seed a weight, the mean over halves of its share of the half. Of independent seeds with the
    variance s^2 the resamples of the mean have the variance s^2 times the sum of the weights' variances, in
    expectation, where the mean itself has s^2 / n. Without halves this is the usual sqrt(n / (n - 1)).
    """
    counts = draws_of(num_seeds)
    weights, number = np.zeros(counts.shape), np.zeros((len(counts), 1))
    for first, is_whole in _halves(counts):
        for part in (first, ~first):
            half = counts[is_whole] * part
            weights[is_whole] += half / half.sum(axis=1, keepdims=True)
            number[is_whole] += 1
    return math.sqrt(1 / num_seeds / (weights / number).var(axis=0).sum())


def _halves(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each half of the seeds, (seeds,) bool, and the draws that leave neither it nor the rest empty, (draws,) bool."""
    num_seeds = counts.shape[1]
    for half in combinations(range(num_seeds), num_seeds // 2):
        first = np.isin(np.arange(num_seeds), half)
        yield first, counts[:, first].any(axis=1) & counts[:, ~first].any(axis=1)


@dataclass(frozen=True)
class Resampled:
    """An area, or a difference of two, with its resamples.

    Attributes:
        value: Of all seeds.
        draws: (draws,): of the resamples, none of fewer than `MIN_SEEDS` seeds.
        seeds: Seeds.
    """

    value: float
    draws: np.ndarray
    seeds: tuple[int, ...]

    def minus(self, other: "Resampled") -> "Resampled":
        """The paired difference: both are of the same seeds, which every draw resamples for both alike."""
        return Resampled(self.value - other.value, self.draws - other.draws, self.seeds)

    @property
    def estimate(self) -> Estimate:
        """With the standard error; below rounding there is none."""
        if len(self.seeds) < MIN_SEEDS:
            return Estimate(self.value)
        error = float(self.draws.std()) * inflation(len(self.seeds))
        return Estimate(self.value, error if error > 1e-12 else 0.0, len(self.seeds) - 1)


def resampled_area(points: Points, base: Mapping[str, float], quality: Quality = PRIMARY) -> Resampled:
    """A method's cross-fitted area in a cell, of all seeds and of each resample; of one seed the plain area."""
    num_seeds = len(points.seeds)
    area = crossfit_area if num_seeds > 1 else plain_area
    draws = draws_of(num_seeds) if num_seeds >= MIN_SEEDS else np.empty((0, num_seeds), dtype=int)
    # Few seeds have few different resamples: each is computed once.
    different, times = np.unique(draws, axis=0, return_counts=True)
    values = area(points, base, np.concatenate([np.ones((1, num_seeds)), different]), quality)
    return Resampled(float(values[0]), np.repeat(values[1:], times), points.seeds)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over cells, whose seeds are independent; without an error where a cell has none."""
    value = float(np.mean([one.value for one in estimates]))
    if any(one.error is None for one in estimates):
        return Estimate(value)
    squares = [one.error**2 for one in estimates]
    total = sum(squares)
    if not total:
        return Estimate(value, 0.0)
    degrees = total**2 / sum(square**2 / one.degrees for square, one in zip(squares, estimates, strict=True) if square)
    return Estimate(value, math.sqrt(total) / len(estimates), degrees)


def as_record() -> dict[str, Any]:
    """The definitions that are numbers, as they are frozen."""
    return {"num_draws": NUM_DRAWS, "drawing_seed": DRAWING_SEED, "level": LEVEL, "min_seeds": MIN_SEEDS}
