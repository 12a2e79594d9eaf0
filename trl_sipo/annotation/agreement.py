# SPDX-License-Identifier: Apache-2.0
"""How far raters agree. Pure: labels by item in, numbers out."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, exp, fsum, lgamma, log, log1p

Labels = Sequence[Sequence[Hashable]]
"""The labels that each item got, from as many raters as gave it one."""


@dataclass(frozen=True)
class FleissKappa:
    """Agreement beyond chance of items with one number of labels.

    Attributes:
        value: At most 1; None: all labels are the same, so that there is nothing beyond chance.
        num_items: Which had the number of labels that most items have.
        num_labels: That number.
    """

    value: float | None
    num_items: int
    num_labels: int


def krippendorff_alpha(items: Labels) -> float | None:
    """Krippendorff's alpha for nominal labels, with any number of labels for an item (Krippendorff 2004, ch. 11).

    `1 - observed / expected` disagreement: 1 is perfect agreement, 0 that of chance.

    Args:
        items: Those with one label or none are passed over.

    Returns:
        None where it is not defined: no item has two labels, or all labels are the same.
    """
    counts = [Counter(labels) for labels in items if len(labels) > 1]
    totals: Counter[Hashable] = sum(counts, Counter())
    num_labels = totals.total()
    expected = num_labels**2 - sum(number**2 for number in totals.values())
    if expected == 0:
        return None
    observed = sum(_disagreeing(count) / (count.total() - 1) for count in counts)
    return 1 - (num_labels - 1) * observed / expected


def _disagreeing(counts: Counter[Hashable]) -> int:
    """Ordered pairs of labels of an item that differ."""
    return counts.total() ** 2 - sum(number**2 for number in counts.values())


def fleiss_kappa(items: Labels) -> FleissKappa:
    """Fleiss' kappa (1971) over the items with the number of labels that is most frequent, from 2 on."""
    sizes = Counter(len(labels) for labels in items if len(labels) > 1)
    if not sizes:
        return FleissKappa(None, 0, 0)
    size = max(sizes, key=lambda number: (sizes[number], number))
    counts = [Counter(labels) for labels in items if len(labels) == size]
    totals: Counter[Hashable] = sum(counts, Counter())
    by_chance = sum((number / totals.total()) ** 2 for number in totals.values())
    if by_chance == 1:
        return FleissKappa(None, len(counts), size)
    agreement = sum(1 - _disagreeing(count) / (size * (size - 1)) for count in counts) / len(counts)
    return FleissKappa((agreement - by_chance) / (1 - by_chance), len(counts), size)


def agreement_with(own: Mapping[str, Hashable], labels: Mapping[str, Hashable]) -> float | None:
    """Share of a rater's labels, by pair, that are those of others; None: there is none to compare."""
    compared = [own[key] == labels[key] for key in own if key in labels]
    return sum(compared) / len(compared) if compared else None


def binomial_p_value(hits: int, total: int) -> float:
    """Two-sided exact p-value of "a hit is as likely as a miss"; 1 of no trials."""
    fewer = min(hits, total - hits)
    if 2 * fewer == total:
        return 1.0
    return 2 * sum(comb(total, number) for number in range(fewer + 1)) / 2**total


def binomial_tail(hits: int, total: int, rate: float) -> float:
    """Probability of `hits` or more of `total` trials, each a hit with probability `rate` in (0, 1)."""
    if hits <= 0:
        return 1.0
    terms = [
        lgamma(total + 1) - lgamma(number + 1) - lgamma(total - number + 1)  # the number of ways is beyond a float
        + number * log(rate) + (total - number) * log1p(-rate)
        for number in range(hits, total + 1)
    ]  # fmt: skip
    return min(1.0, fsum(map(exp, terms)))
