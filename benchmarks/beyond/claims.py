# SPDX-License-Identifier: Apache-2.0
"""What held in every run on on-policy pairs with all weights, and is asked of every new one of these.

Each compares two arms that differ by the proximal term alone, with the same base, pairs, beta, learning rate, seed and
step. The headline ends with an error where one fails. Elsewhere they held nearly always: `reports/beyond/README.md`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
#: Without the term, and with it.
SMALL_BETA = (("DPO", "beta 20"), ("proximal", "beta 20, kappa 0.5"))
FAST_RATE = (("DPO", "beta 200, lr 0.0001"), ("proximal", "beta 200, kappa 0.1, lr 0.0001"))


@dataclass(frozen=True)
class Claim:
    """A statement about pairs of runs.

    Attributes:
        text: For people.
        arms: Without the term, and with it, each (method, setting).
        holds: Of the two measurements of a step.
        at_the_end: Whether it is about last measurements alone, of runs of the full length.
    """

    text: str
    arms: tuple[tuple[str, str], tuple[str, str]]
    holds: Callable[[Row, Row], bool]
    at_the_end: bool = False


def _drifts_less(without: Row, with_term: Row) -> bool:
    return with_term["held_out_chosen_drift"] < without["held_out_chosen_drift"]


def _is_better(without: Row, with_term: Row) -> bool:
    return with_term["frechet_distance"] < without["frechet_distance"]


CLAIMS = (
    Claim("beta 20: with kappa 0.5 the winner's held-out error has risen less", SMALL_BETA, _drifts_less),
    Claim("beta 20: with kappa 0.5 the Frechet distance is lower", SMALL_BETA, _is_better, at_the_end=True),
    Claim("beta 200, lr 1e-4: with kappa 0.1 the Frechet distance is lower", FAST_RATE, _is_better, at_the_end=True),
)


def judged(rows: Iterable[Row], *, last_step: int, quick: bool = False) -> list[tuple[Claim, int, int]]:
    """How often each claim holds on on-policy pairs with all weights, of how many pairs of measurements.

    Args:
        rows: As `runs.rows_of` gives them.
        last_step: Of runs of the full length.
        quick: Leave out the claims about full runs.
    """
    found: dict[tuple, dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row["source"] != "on_policy" or row["is_lora"]:
            continue
        cell = tuple(row[name] for name in ("base", "source", "flip_rate", "is_lora"))
        found.setdefault((*cell, row["seed"], row["step"]), {})[row["method"], row["setting"]] = row
    judgements = []
    for claim in CLAIMS:
        if quick and claim.at_the_end:
            continue
        pairs = [
            (arms[claim.arms[0]], arms[claim.arms[1]])
            for key, arms in found.items()
            if set(claim.arms) <= set(arms) and (not claim.at_the_end or key[-1] == last_step)
        ]
        judgements.append((claim, sum(claim.holds(*pair) for pair in pairs), len(pairs)))
    return judgements


def as_lines(judgements: Sequence[tuple[Claim, int, int]]) -> list[str]:
    """One sentence per claim."""
    return [f"{claim.text}: {held} of {total} measurements." for claim, held, total in judgements]


def failed(judgements: Sequence[tuple[Claim, int, int]]) -> list[str]:
    """The claims that did not hold each time, or had nothing to be judged by."""
    return [claim.text for claim, held, total in judgements if held < total or not total]
