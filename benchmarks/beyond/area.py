# SPDX-License-Identifier: Apache-2.0
"""The plane of preference and quality, frontiers in it, and the area below them.

A point is one policy: `x` its win rate over the base, 0 at one half and 1 at 1; `y` its quality, 0 for the worst and 1
for the best that counts. A policy dominates the rectangle from the origin to its point, a method the union of those of
its points; the area of that union (hypervolume; Zitzler and Thiele 1999) is between 0 and 1. The base has `x = 0`: it
dominates nothing, and neither does a policy that loses against it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: Multiples of the base's Frechet distance at which quality is 0 and 1.
FRECHET_WORST, FRECHET_BEST = 4.0, 0.5
#: A run whose Frechet distance is beyond this multiple of the base's has collapsed.
COLLAPSED = 3.0
#: What a point is computed from, in the order of the last axis of arrays.
MEASURES = ("win_rate", "frechet_distance", "second_accuracy", "diversity")


def on_log_scale(distance: np.ndarray, base: Mapping[str, float], worst: float, best: float) -> np.ndarray:
    """Quality of a Frechet distance, with multiples of the base's at which it is 0 and 1."""
    worst, best = worst * base["frechet_distance"], best * base["frechet_distance"]
    return np.log(worst / np.maximum(distance, best)) / np.log(worst / best)


def _of_accuracy(accuracy: np.ndarray, base: Mapping[str, float]) -> np.ndarray:
    return accuracy


def _of_diversity(diversity: np.ndarray, base: Mapping[str, float]) -> np.ndarray:
    # More than the base's is no merit: noise has much of it, too.
    return diversity / base["diversity"]


#: Qualities, the first of which is the primary one: of measures and the base's measures, before clipping to [0, 1].
QUALITIES = {
    "frechet_distance": lambda distance, base: on_log_scale(distance, base, FRECHET_WORST, FRECHET_BEST),
    "second_accuracy": _of_accuracy,
    "diversity": _of_diversity,
}
PRIMARY = next(iter(QUALITIES))
#: A key of `QUALITIES`, or a measure and a function like theirs.
Quality = str | tuple[str, Callable[[np.ndarray, Mapping[str, float]], np.ndarray]]


def on_plane(measured: np.ndarray, base: Mapping[str, float], quality: Quality = PRIMARY) -> np.ndarray:
    """The points of policies.

    Args:
        measured: (..., 4): `MEASURES`. A measure that is no number counts as the worst.
        base: The base's, by name.
        quality: Key of `QUALITIES`: the Frechet distance on a logarithmic scale between four times and half of the
            base's; the accuracy by the second verifier, as it is; or the diversity as a share of the base's. Or
            a measure with a scale of its own.

    Returns:
        (..., 2) in [0, 1].
    """
    x = 2 * (measured[..., MEASURES.index("win_rate")] - 0.5)
    measure, scale = (quality, QUALITIES[quality]) if isinstance(quality, str) else quality
    y = scale(measured[..., MEASURES.index(measure)], base)
    return np.nan_to_num(np.stack([x, y], axis=-1), nan=0.0).clip(0, 1)


def on_frontier(points: np.ndarray) -> np.ndarray:
    """Which points dominate something and are dominated by none: as good in both and better in one.

    Args:
        points: (..., points, 2) in [0, 1].

    Returns:
        (..., points) bool; of two equal points, both.
    """
    first, second = points[..., :, None, :], points[..., None, :, :]
    is_beaten = (second >= first).all(-1) & (second > first).any(-1)
    return ~is_beaten.any(-1) & (points > 0).all(-1)


def dominated_area(points: np.ndarray) -> np.ndarray:
    """Area of the union of the rectangles from the origin to each point.

    Args:
        points: (..., points, 2) in [0, 1]; none dominate 0.

    Returns:
        (...,) in [0, 1].
    """
    order = np.argsort(-points[..., 0], axis=-1, kind="stable")
    x, y = (np.take_along_axis(points[..., axis], order, axis=-1) for axis in (0, 1))
    # From the right: as far as the next point reaches, the highest of those that reach farther counts.
    widths = -np.diff(x, append=0.0, axis=-1)
    return (widths * np.maximum.accumulate(y, axis=-1)).sum(-1) if points.shape[-2] else np.zeros(points.shape[:-2])


def as_record() -> dict[str, Any]:
    """The definitions that are numbers, as they are frozen."""
    return {
        "qualities": list(QUALITIES),
        "frechet_worst": FRECHET_WORST,
        "frechet_best": FRECHET_BEST,
        "collapsed": COLLAPSED,
    }
