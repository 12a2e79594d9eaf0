# SPDX-License-Identifier: Apache-2.0
"""How far labels, rewards and a model agree on pairs, how noisy that makes the labels look, and what it suggests.

**Noise from agreement.** Say that of each pair one arm is truly better, and that each rater is right with a
probability a of its own, independently of the others. With c = 2a - 1, two raters then agree in a share
p = (1 + c_1 c_2) / 2 of the pairs. Of three raters, the label and two rewards, the three shares give all three:
c_label^2 = (2 p_label1 - 1)(2 p_label2 - 1) / (2 p_12 - 1), the model of Dawid and Skene (1979) solved by moments, and
the share of turned labels is (1 - c_label) / 2. The assumption does the work: rewards that were trained on the same
judgements, or see the same things, agree for that reason, and the labels then look noisier than they are; rewards that
share the labels' own errors make them look cleaner.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from trl_sipo.data.checking.noise import CLEAN, NOISY
from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval

LABEL = "label"
_NUM_RESAMPLES, _CHUNK = 1000, 50  # of which so many are held in memory at a time
_LEAST_PAIRS = 30  # below which noise is not estimated
_LEAST_AGREEMENT = 0.05  # of two rewards above chance, below which nothing follows from them
NEAR_TIE = 0.1  # standard deviations of a reward's differences


@dataclass(frozen=True)
class Agreement:
    """How often two raters prefer the same arm.

    Attributes:
        first, second: The raters.
        agreeing: Share of the pairs that both tell apart; None: there are none.
        num_pairs: Which these are.
    """

    first: str
    second: str
    agreeing: Interval | None
    num_pairs: int

    @property
    def conflict(self) -> Interval | None:
        """The share that they rank in opposite ways."""
        if self.agreeing is None:
            return None
        return Interval(1 - self.agreeing.estimate, 1 - self.agreeing.high, 1 - self.agreeing.low)


def agreements(votes: Mapping[str, np.ndarray], prompts: Sequence[object]) -> list[Agreement]:
    """Every two raters.

    Args:
        votes: Rater to (pairs,): above 0 where it prefers the chosen sample, below where the rejected one, 0 where it
            does not tell them apart, NaN where it was not asked. The labels' own are 1 throughout.
        prompts: (pairs,) hashable.
    """
    found = []
    for first, second in combinations(votes, 2):
        product = np.sign(votes[first]) * np.sign(votes[second])
        told = np.flatnonzero(~np.isnan(product) & (product != 0))
        agreeing = None
        if len(told):
            values = ((product[told] + 1) / 2).tolist()
            agreeing = clustered_interval(by_cluster(values, [prompts[place] for place in told]), bounds=(0.0, 1.0))
        found.append(Agreement(first, second, agreeing, len(told)))
    return found


def near_tie_share(differences: np.ndarray) -> float | None:
    """Share of differences of a reward that are smaller than a tenth of their standard deviation; None of nothing."""
    known = differences[~np.isnan(differences)]
    if len(known) < 2 or np.ptp(known) == 0:
        return None
    return float((np.abs(known) < NEAR_TIE * known.std()).mean())


def turned_labels(
    votes: Mapping[str, np.ndarray], prompts: Sequence[object], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """The share of labels that are turned, by each two rewards: "first and second" to estimate and 95 % interval.

    The interval is a bootstrap's over prompts, by percentiles. Two rewards that hardly agree with one another, or with
    the labels less than by chance, give no estimate and are left out.

    Args:
        votes: As for [`agreements`], with the labels' own under `LABEL`.
    """
    rewards = [name for name in votes if name != LABEL]
    found = {}
    for first, second in combinations(rewards, 2):
        signs = np.stack([np.sign(votes[name]) for name in (LABEL, first, second)])
        products = np.stack([signs[0] * signs[1], signs[0] * signs[2], signs[1] * signs[2]])
        told = np.flatnonzero((~np.isnan(products) & (products != 0)).all(0))
        if len(told) < _LEAST_PAIRS:
            continue
        sums, counts = _by_prompt(products[:, told], [prompts[place] for place in told])
        estimate = _turned(sums.sum(1) / counts.sum())
        if estimate is None:
            continue
        resampled = [_turned(means) for means in _resampled_means(sums, counts, np.random.default_rng(seed))]
        low, high = _percentiles(resampled, estimate)
        # Where none is seen to be turned no resample has one either: so rare an event may have been missed. So may a
        # label that is right where all seem to be turned.
        missed = min(0.5, -math.log(0.025) / len(counts))
        found[f"{first} and {second}"] = {
            "estimate": estimate,
            "low": min(low, 1 - missed),
            "high": max(high, missed),
            "num_pairs": len(told),
        }
    return found


def _resampled_means(sums: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of the products with prompts drawn with replacement, (_NUM_RESAMPLES, 3)."""
    even, parts = np.full(len(counts), 1 / len(counts)), []
    for _ in range(_NUM_RESAMPLES // _CHUNK):
        draws = generator.multinomial(len(counts), even, _CHUNK).T.astype(np.float64)
        parts.append((sums @ draws / (counts @ draws)).T)
    return np.concatenate(parts)


def _percentiles(resampled: Sequence[float | None], estimate: float) -> tuple[float, float]:
    """Of 95 %. A resample in which the rewards do not agree says nothing of the labels but on which side they are."""
    side = (0.0, 0.5) if estimate <= 0.5 else (0.5, 1.0)
    lows, highs = ([unknown if value is None else value for value in resampled] for unknown in side)
    return float(np.quantile(lows, 0.025)), float(np.quantile(highs, 0.975))


def _by_prompt(products: np.ndarray, prompts: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the products (3, prompts), and their numbers (prompts,)."""
    clusters = [by_cluster(row.tolist(), prompts) for row in products]
    return np.stack([part.sums for part in clusters]), clusters[0].counts


def _turned(means: np.ndarray) -> float | None:
    """From the mean products of (label and first, label and second, first and second), which are 2p - 1."""
    with_first, with_second, between = means
    if between < _LEAST_AGREEMENT or with_first * with_second < 0:
        return None
    strength = math.sqrt(with_first * with_second / between)
    return (1 - math.copysign(min(strength, 1.0), with_first)) / 2


@dataclass(frozen=True)
class Advice:
    """What is suggested for training on these labels.

    Attributes:
        words: Sentences.
        poly_alpha: Where to start: None where the audit cannot tell.
        label_smoothing: The share of turned labels, where it is known well enough to be of use.
    """

    words: str
    poly_alpha: float | None = None
    label_smoothing: float | None = None

    def as_numbers(self) -> dict[str, Any]:
        """For JSON."""
        return {"words": self.words, "poly_alpha": self.poly_alpha, "label_smoothing": self.label_smoothing}


def advise(turned: Mapping[str, Mapping[str, float]], easiest: Interval | None) -> Advice:
    """What the share of turned labels, and how easy the pairs are, suggest for Poly-DPO and its likes.

    Args:
        turned: Ways of estimating the share of turned labels, each with "estimate", "low" and "high".
        easiest: The largest share of pairs that something which knows nothing of preferences gets right: a shortcut,
            or the untrained model; None: nothing was measured.
    """
    if not turned:
        return Advice(
            "Nothing follows for `poly_alpha`: no two rewards, nor repeated judgements, say how noisy the labels are. "
            "Compare 0 and 8 on held-out pairs."
        )
    estimate = float(np.median([part["estimate"] for part in turned.values()]))
    low, high = min(part["low"] for part in turned.values()), max(part["high"] for part in turned.values())
    found = f"About {estimate:.0%} of the labels look turned ({low:.0%} to {high:.0%}, by {', '.join(turned)})."
    rule = f"The bounds, {CLEAN:.0%} and {NOISY:.0%}, are a rule of thumb, no published result."
    smoothing = round(estimate, 3) if high < 0.45 and estimate > CLEAN else None
    if low > 0.5:
        return Advice(f"{found} Turn them around before anything else.")
    if low > NOISY:
        words = (
            f"{found} That is noisy: start with a positive `poly_alpha`; 8 is reported best on Pick-a-Pic v2, whose "
            "noise is of another kind, so try smaller ones beside it."
        )
        return Advice(f"{words} {_other_ways(smoothing)} {rule}", 8.0, smoothing)
    if high < CLEAN:
        if easiest is not None and easiest.low > 0.9:
            words = (
                f"{found} That is clean, and the pairs are easy: what knows nothing of preferences gets "
                f"{easiest.estimate:.0%} right. Start with `poly_alpha` 0, and try a negative one, down to -1."
            )
        else:
            words = f"{found} That is clean: start with `poly_alpha` 0, which is Diffusion-DPO."
        return Advice(f"{words} {rule}", 0.0)
    words = f"{found} That is neither clearly clean nor clearly noisy: compare `poly_alpha` 0 and 8 on held-out pairs."
    return Advice(f"{words} {_other_ways(smoothing)} {rule}", None, smoothing)


def _other_ways(smoothing: float | None) -> str:
    if smoothing is None:
        return "Votes as soft labels (`soft_labels`), or leaving near-ties out, treat the cause."
    return (
        f"If labels are turned at random, `label_smoothing={smoothing:g}` is the remedy made for it; votes as soft "
        "labels (`soft_labels`), or leaving near-ties out, treat the cause."
    )
