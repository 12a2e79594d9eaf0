# SPDX-License-Identifier: Apache-2.0
"""From numbers to verdicts, by rules that were stated before the numbers were seen.

Accuracy, which has a value per image:

- **holds**: the difference has the claimed sign with every seed, and the sign-flip test over prompts rejects "no
  difference" at 5 % after Holm's correction over the comparisons of the question;
- **opposite**: the same with the other sign;
- **alike**: neither, and the interval over prompts and every seed lie within 5 points of no difference;
- **undecided**: none of these: the runs are too few to tell.

Measures with one value per run: the 95 % interval of Student's t over seeds must exclude no difference; there is no
"alike". A claim that something is *kept* holds where the interval over prompts and every seed lie above -5 points.

A claim is *reproduced* if all its checks hold, *partly* if some do, *not reproduced* if none does and at least one is
opposite or alike, and *cannot be said here* if all are undecided, or nothing was run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intervals import PER_IMAGE
from protocol import LEVEL, MARGIN

HOLDS, OPPOSITE, ALIKE, UNDECIDED = "holds", "opposite", "alike", "undecided"
REPRODUCED, PARTLY, NOT_REPRODUCED = "reproduced", "partly", "not reproduced"
CANNOT_BE_SAID = "cannot be said here"
#: What claims on quality are checked on: by the verifier that did not rank the pairs.
QUALITY = "second_accuracy"


@dataclass(frozen=True)
class Check:
    """One comparison that a claim rests on.

    Attributes:
        text: What was compared, and the numbers.
        outcome: `HOLDS`, `OPPOSITE`, `ALIKE` or `UNDECIDED`.
    """

    text: str
    outcome: str


def verdict(checks: Sequence[Check]) -> str:
    """The verdict of a claim; see the module."""
    outcomes = [check.outcome for check in checks]
    if not outcomes or set(outcomes) == {UNDECIDED}:
        return CANNOT_BE_SAID
    if set(outcomes) == {HOLDS}:
        return REPRODUCED
    return PARTLY if HOLDS in outcomes else NOT_REPRODUCED


def by_prompts(row: Mapping[str, Any], sign: int) -> str:
    """The outcome of "the difference has this sign", of a measure with a value per image."""
    values = [sign * value for value in row["values"]]
    if row["p_holm"] <= LEVEL and min(values) > 0:
        return HOLDS
    if row["p_holm"] <= LEVEL and max(values) < 0:
        return OPPOSITE
    return ALIKE if _within_margin(row) else UNDECIDED


def _within_margin(row: Mapping[str, Any]) -> bool:
    bounds = [*row["values"], row["over_prompts"]["low"], row["over_prompts"]["high"]]
    return max(abs(bound) for bound in bounds) <= MARGIN


def by_seeds(row: Mapping[str, Any], sign: int, *, null: float = 0.0) -> str:
    """The outcome of "the mean is above `null`" (or below, with a sign of -1), of values over seeds."""
    if row["low"] is None:
        return UNDECIDED
    low, high = sorted(sign * (row[end] - null) for end in ("low", "high"))
    if low > 0:
        return HOLDS
    return OPPOSITE if high < 0 else UNDECIDED


def is_kept(row: Mapping[str, Any]) -> str:
    """The outcome of "the first is not worse than the second", of a measure with a value per image."""
    if min([*row["values"], row["over_prompts"]["low"]]) > -MARGIN:
        return HOLDS
    return OPPOSITE if by_prompts(row, 1) == OPPOSITE else UNDECIDED


def higher(result: Mapping[str, Any], first: str, second: str, measure: str = QUALITY, *, sign: int = 1) -> Check:
    """Whether the first has more of a measure than the second; with a sign of -1, less."""
    row = result["comparisons"][f"{first} - {second}"][measure]
    outcome = by_prompts(row, sign) if measure in PER_IMAGE else by_seeds(row, sign)
    return Check(
        f"{titled(first)} {'above' if sign > 0 else 'below'} {titled(second)}: {shown(row, measure)}", outcome
    )


def lower(result: Mapping[str, Any], first: str, second: str, measure: str = QUALITY) -> Check:
    """Whether the first has less of a measure than the second."""
    return higher(result, first, second, measure, sign=-1)


def kept(result: Mapping[str, Any], first: str, second: str, measure: str = QUALITY) -> Check:
    """Whether the first has lost no more than the margin against the second."""
    row = result["comparisons"][f"{first} - {second}"][measure]
    return Check(f"{titled(first)} keeps {titled(second)}: {shown(row, measure)}", is_kept(row))


def level(result: Mapping[str, Any], label: str, measure: str, *, sign: int, text: str, null: float = 0.0) -> Check:
    """Whether a measure of an arm at its last step lies above `null` (below, with a sign of -1), over seeds."""
    row = result["arms"][label]["final"][measure]
    return Check(f"{text}, {label}: {row['mean']:.2f} {seeds_interval(row, '.2f')}", by_seeds(row, sign, null=null))


def titled(point: str) -> str:
    """A label in words: "DPO, beta 2@50" is "DPO, beta 2 (step 50)"."""
    label, _, step = point.partition("@")
    return f"{label} (step {step})" if step else label


#: Name and format of what is compared, and what a unit is multiplied by.
WORDS = {
    "accuracy": ("points", "+.0f", 100),
    "second_accuracy": ("points", "+.0f", 100),
    "frechet_distance": ("of Frechet distance", "+.0f", 1),
    "diversity": ("of diversity", "+.2f", 1),
    "held_out_margins": ("of margin", "+.2f", 1),
    "held_out_accuracies": ("points of implicit accuracy", "+.0f", 100),
    "masked_share": ("points of masked pairs", "+.0f", 100),
    "held_out_chosen_error": ("of the winner's error", "+.2f", 1),
}


def shown(row: Mapping[str, Any], measure: str) -> str:
    """A difference with its intervals and p-value."""
    unit, form, scale = WORDS[measure]
    text = f"{scale * row['mean']:{form}} {unit}, seeds {seeds_interval(row, form, scale)}"
    if "over_prompts" not in row:
        return text
    over = row["over_prompts"]
    return f"{text}, prompts [{scale * over['low']:{form}}, {scale * over['high']:{form}}], p {p_text(row['p_holm'])}"


def seeds_interval(row: Mapping[str, Any], form: str, scale: float = 1) -> str:
    """The interval over seeds, or that there is none, as of one seed."""
    if row["low"] is None:
        return "[none]"
    return f"[{scale * row['low']:{form}}, {scale * row['high']:{form}}]"


def p_text(value: float) -> str:
    """A p-value as it is written."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
