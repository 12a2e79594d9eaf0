# SPDX-License-Identifier: Apache-2.0
"""How noisy labels look, from judgements that were made twice or that form triples.

If each label is turned with the same probability e, independently, two judgements of a pair agree with probability
(1 - e)^2 + e^2, and a triple of three arms that have a true order is cyclic with probability e (1 - e). Both are
solved for e. Where annotators lean the same way, or pairs differ in how hard they are, e is not that probability.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from trl_sipo.data.checking.judgements import Count

_Z = 1.959964  # 95 %
FEW = 30  # comparisons below which no suggestion is made
CLEAN, NOISY = 0.05, 0.15

CANNOT_KNOW = (
    "This cannot tell a second judgement from a copied row (copies always agree), and says nothing of errors that all "
    "annotators share, of pairs that were judged once, or of pairs that a ranking or a majority made consistent "
    "before they were published."
)


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval (Wilson)."""

    hits: int
    total: int
    value: float
    low: float
    high: float


def share(count: Count) -> Share | None:
    """Wilson's interval of a binomial share; None of nothing."""
    if count.total == 0:
        return None
    value, ratio = count.hits / count.total, _Z**2 / count.total
    centre = (value + ratio / 2) / (1 + ratio)
    half = _Z * math.sqrt(value * (1 - value) / count.total + ratio / (4 * count.total)) / (1 + ratio)
    low = 0.0 if count.hits == 0 else centre - half
    high = 1.0 if count.hits == count.total else centre + half
    return Share(count.hits, count.total, value, low, high)


def flips_from_agreement(agreement: float) -> float:
    """e of (1 - e)^2 + e^2 = agreement; one half at and below chance."""
    return (1 - math.sqrt(max(0.0, 2 * agreement - 1))) / 2


def flips_from_cycles(cyclic: float) -> float:
    """e of e (1 - e) = cyclic; one half at and above chance, one quarter."""
    return (1 - math.sqrt(max(0.0, 1 - 4 * cyclic))) / 2


def noise_report(agreement: Count, triples: Count, minority_share: float | None) -> dict[str, Any]:
    """What is logged of label noise: shares with intervals, the flips they imply, and what that suggests.

    Args:
        agreement: of repeated judgements, those that agree.
        triples: of triples, those that are cyclic.
        minority_share: mean share of votes for the side with fewer, of labels that are shares of votes; None: others.
    """
    agreeing, cyclic = share(agreement), share(triples)
    return {
        "agreement_of_repeats": None if agreeing is None else asdict(agreeing),
        "flips_from_repeats": None if agreeing is None else _range(flips_from_agreement, agreeing),
        "cyclic_triples": None if cyclic is None else asdict(cyclic),
        "flips_from_triples": None if cyclic is None else _range(flips_from_cycles, cyclic),
        "mean_minority_share": minority_share,
        "suggestion": suggestion(agreeing, cyclic),
        "cannot_know": CANNOT_KNOW,
    }


def suggestion(agreeing: Share | None, cyclic: Share | None) -> str:
    """A starting point for Poly-DPO's `poly_alpha`, from the larger of the two rates of flips."""
    rates = []
    if agreeing is not None and agreeing.total >= FEW:
        rates.append(_range(flips_from_agreement, agreeing))
    if cyclic is not None and cyclic.total >= FEW:
        rates.append(_range(flips_from_cycles, cyclic))
    if not rates:
        return (
            f"Nothing: fewer than {FEW} pairs were judged twice, and as few triples in full. Compare `poly_alpha` 0 "
            "and 8 on held-out pairs."
        )
    worst = max(rates, key=lambda rate: rate["value"])
    found = f"About {worst['value']:.0%} of the labels look turned ({worst['low']:.0%} to {worst['high']:.0%})."
    if worst["low"] > NOISY:
        advice = "That is noisy: start with a positive `poly_alpha`; 8 is reported best on Pick-a-Pic v2."
    elif worst["high"] < CLEAN:
        advice = "That is clean: start with `poly_alpha` near 0, which is Diffusion-DPO."
    else:
        advice = "That is neither clearly clean nor clearly noisy: compare `poly_alpha` 0 and 8 on held-out pairs."
    return f"{found} {advice} The bounds, {CLEAN:.0%} and {NOISY:.0%}, are a rule of thumb, no published result."


def _range(flips: Any, of: Share) -> dict[str, float]:
    ends = sorted((flips(of.low), flips(of.high)))
    return {"value": flips(of.value), "low": ends[0], "high": ends[1]}
