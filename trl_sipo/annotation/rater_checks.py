# SPDX-License-Identifier: Apache-2.0
"""Which raters did not follow the instructions, by thresholds set before (SIPO paper, appendix E.4). Pure.

Few answers prove little: who sees no difference, and may not or will not say "tie", reverses three of four mirrored
repeats or more in five cases of sixteen. So a share beyond its threshold counts only where chance, or a careful rater,
would hardly come to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from trl_sipo.annotation.agreement import binomial_p_value, binomial_tail
from trl_sipo.annotation.records import GOLD, LEFT, TIE, Rater
from trl_sipo.annotation.votes import FIRST, Judgement, mirrored_labels
from trl_sipo.errors import StudyError

_CHANCE = 0.001  # of a side, or of reversals, by tosses of a coin
_CAREFUL_WRONG = 0.1  # of gold pairs; of those that are blurred and noisy it is far less
_CAREFUL = 0.01  # probability that such a rater is as often wrong on gold
_LEAST_ANSWERS = 10


@dataclass(frozen=True)
class CheckSettings:
    """From where on a rater is discarded.

    Args:
        max_side_share: Of the answers that are no ties, on one side; and such a share by chance has a probability
            below 0.001.
        min_gold_share: Of the gold pairs, right; a tie is wrong. And who is wrong on one in ten would be wrong on so
            many with a probability below 0.01.
        max_reversed_share: Of the mirrored repeats, in which the other one of the two was chosen; ties are no
            reversals. And so many by chance have a probability below 0.001. Who chooses at random reverses half, and
            so does who sees no difference: beyond that, the side decides.
        min_median_seconds: Spent on an answer, of at least ten.
        min_answered_share: Of the rater's tasks. 0: none has to be done, as long as a study is running.

    Raises:
        StudyError: A number out of range.
    """

    max_side_share: float = 0.9
    min_gold_share: float = 0.75
    max_reversed_share: float = 0.6
    min_median_seconds: float = 1.0
    min_answered_share: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= (float("inf") if name == "min_median_seconds" else 1):
                raise StudyError(f"`{name}` must be a share from 0 to 1, or a number of seconds, got {value}.")


@dataclass(frozen=True)
class RaterCheck:
    """What a rater did, and why they are discarded.

    Attributes:
        rater: Who.
        num_tasks, num_answered: Assignments, and those decided.
        num_left, num_right, num_ties: Of all decisions.
        side_p_value: Of "left is as likely as right".
        gold_right, gold_total: Gold pairs, right and answered.
        reversed, mirrored: Repeats with the opposite choice, and answered.
        median_seconds, total_seconds: None without answers.
        reasons: Why the rater is discarded; empty: they are kept.
    """

    rater: Rater
    num_tasks: int
    num_answered: int
    num_left: int
    num_right: int
    num_ties: int
    side_p_value: float
    gold_right: int
    gold_total: int
    reversed: int
    mirrored: int
    median_seconds: float | None
    total_seconds: float
    reasons: tuple[str, ...]


def check_rater(rater: Rater, num_tasks: int, judgements: Sequence[Judgement], settings: CheckSettings) -> RaterCheck:
    """Count what a rater did, and compare it with the thresholds.

    Args:
        num_tasks: Assigned to the rater.
        judgements: Of this rater, all kinds.
    """
    left = sum(judgement.choice == LEFT for judgement in judgements)
    ties = sum(judgement.choice == TIE for judgement in judgements)
    gold = [judgement.label == FIRST for judgement in judgements if judgement.kind == GOLD]
    repeats = mirrored_labels(judgements)
    seconds = [judgement.seconds for judgement in judgements]
    counted = {
        "num_tasks": num_tasks,
        "num_answered": len(judgements),
        "num_left": left,
        "num_right": len(judgements) - left - ties,
        "num_ties": ties,
        "side_p_value": binomial_p_value(left, len(judgements) - ties),
        "gold_right": sum(gold),
        "gold_total": len(gold),
        "reversed": sum(one != other and TIE not in (one, other) for one, other in repeats),
        "mirrored": len(repeats),
        "median_seconds": median(seconds) if seconds else None,
        "total_seconds": sum(seconds),
    }
    check = RaterCheck(rater=rater, **counted, reasons=())
    reasons = (_side(check, settings), _gold(check, settings), _mirrored(check, settings), _speed(check, settings))
    found = tuple(reason for reason in (*reasons, _missing(check, settings)) if reason is not None)
    return RaterCheck(rater=rater, **counted, reasons=found)


def _side(check: RaterCheck, settings: CheckSettings) -> str | None:
    decided, most = check.num_left + check.num_right, max(check.num_left, check.num_right)
    if not decided or most / decided < settings.max_side_share or check.side_p_value >= _CHANCE:
        return None
    side = "left" if most == check.num_left else "right"
    return f"chose the {side} one in {most} of {decided} decisions"


def _gold(check: RaterCheck, settings: CheckSettings) -> str | None:
    wrong, total = check.gold_total - check.gold_right, check.gold_total
    is_careful = binomial_tail(wrong, total, _CAREFUL_WRONG) >= _CAREFUL
    if is_careful or check.gold_right / total >= settings.min_gold_share:
        return None
    return f"was wrong on {wrong} of {total} pairs of which the better is known"


def _mirrored(check: RaterCheck, settings: CheckSettings) -> str | None:
    is_chance = binomial_tail(check.reversed, check.mirrored, 0.5) >= _CHANCE
    if is_chance or check.reversed / check.mirrored <= settings.max_reversed_share:
        return None
    return f"chose the other one in {check.reversed} of {check.mirrored} mirrored repeats"


def _speed(check: RaterCheck, settings: CheckSettings) -> str | None:
    if check.num_answered < _LEAST_ANSWERS or check.median_seconds >= settings.min_median_seconds:
        return None
    return f"took {check.median_seconds:.2g} seconds for an answer in the median of {check.num_answered}"


def _missing(check: RaterCheck, settings: CheckSettings) -> str | None:
    if not check.num_tasks or check.num_answered / check.num_tasks >= settings.min_answered_share:
        return None
    return f"answered {check.num_answered} of {check.num_tasks}"
