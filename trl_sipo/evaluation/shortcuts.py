# SPDX-License-Identifier: Apache-2.0
"""Whether something trivial tells the chosen sample from the rejected one: its size, its compression, its brightness.

A policy learns whatever separates the arms, and the cheapest first. A feature is measured by how often the chosen
sample has more of it than the rejected one of the same pair, ties counted one half: the area under the ROC curve of
paired samples. One half is chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval

_LEVEL = 0.95  # of all features together


@dataclass(frozen=True)
class Shortcut:
    """One feature.

    Attributes:
        name: Of the feature.
        area: Share of pairs whose chosen sample has more of it; the intervals of all features hold together.
        num_pairs: In which both samples have the feature.
        num_differing: Of these, those whose samples differ in it.
        wins: Of these, those whose chosen sample has more.
    """

    name: str
    area: Interval
    num_pairs: int
    num_differing: int
    wins: int

    @property
    def strength(self) -> float:
        """How far the area is from chance at least, in [0, 1/2]; 0 where it may be chance."""
        return max(self.area.low - 0.5, 0.5 - self.area.high, 0.0)

    @property
    def is_more(self) -> bool:
        """Whether chosen samples have more of it."""
        return self.area.estimate > 0.5


def find_shortcuts(
    names: Sequence[str], chosen: np.ndarray, rejected: np.ndarray, prompts: Sequence[object]
) -> list[Shortcut]:
    """Every feature in which some pair differs, the strongest first.

    Args:
        names: Of the features.
        chosen, rejected: (pairs, features) float64; NaN: this sample has none.
        prompts: (pairs,) hashable; pairs of one prompt are not taken for independent.

    Returns:
        Intervals are Bonferroni's: with a probability of 95 % all of them hold.
    """
    found = []
    for column, name in enumerate(names):
        difference = chosen[:, column] - rejected[:, column]
        is_known = ~np.isnan(difference)
        signs = np.sign(difference[is_known])
        if not signs.any():
            continue
        of_known = [prompts[place] for place in np.flatnonzero(is_known)]
        area = clustered_interval(
            by_cluster(((signs + 1) / 2).tolist(), of_known), level=1 - (1 - _LEVEL) / len(names), bounds=(0.0, 1.0)
        )
        found.append(Shortcut(name, area, len(signs), int((signs != 0).sum()), int((signs > 0).sum())))
    return sorted(found, key=lambda shortcut: shortcut.strength, reverse=True)
