# SPDX-License-Identifier: Apache-2.0
"""Who is discarded, and who is not, on either side of each threshold."""

import random

import pytest

from trl_sipo.annotation.rater_checks import CheckSettings, check_rater
from trl_sipo.annotation.records import GOLD, MIRRORED, SAMPLE, Rater
from trl_sipo.annotation.votes import Judgement
from trl_sipo.errors import StudyError

RATER = Rater(1, "rater-01", 1)


def given(choices, *, kind=SAMPLE, seconds=5.0, start=0):
    """Judgements of pairs that are not flipped: left is the first, which is right of gold."""
    return [
        Judgement(RATER, f"p{start + number}", kind, choice, False, seconds) for number, choice in enumerate(choices)
    ]


def reasons(judgements, num_tasks=100, **options):
    return check_rater(RATER, num_tasks, judgements, CheckSettings(**options)).reasons


L, R, T = "left", "right", "tie"
FAIR = given([L, R] * 10)


def test_a_careful_rater_is_kept_and_counted():
    judgements = FAIR + given([T], start=20, seconds=7.0) + given([L, L, R], kind=GOLD, start=30)
    check = check_rater(RATER, 30, judgements, CheckSettings())
    assert check.reasons == ()
    assert (check.num_left, check.num_right, check.num_ties, check.num_answered, check.num_tasks) == (
        12,
        11,
        1,
        24,
        30,
    )
    assert (check.gold_right, check.gold_total) == (2, 3)
    assert check.median_seconds == 5.0 and check.total_seconds == 23 * 5.0 + 7.0
    assert check.side_p_value == 1.0


@pytest.mark.parametrize(
    "lefts, rights, is_discarded",
    [
        (20, 0, True),
        (0, 20, True),
        (18, 2, True),  # a share of 0.9
        (17, 3, False),
        (10, 0, False),  # by chance once in 512
        (11, 0, True),  # once in 1024
    ],
)
def test_one_side_throughout(lefts, rights, is_discarded):
    found = reasons(given([L] * lefts + [R] * rights + [T] * 9))
    assert bool(found) == is_discarded
    if is_discarded:
        side = "left" if lefts > rights else "right"
        assert found == (f"chose the {side} one in {max(lefts, rights)} of {lefts + rights} decisions",)


@pytest.mark.parametrize(
    "choices, is_discarded",
    [
        ([R, T], False),  # of who is wrong on one in ten, once in 100
        ([R, T, R], True),
        ([L, L, L, R, R], False),  # once in 12
        ([L, L, R, R, T], True),
        ([L] * 15 + [R] * 5, False),  # three quarters right
        ([L] * 14 + [R] * 6, False),  # fewer, and once in 89
        ([L] * 13 + [R] * 7, True),
        ([L] * 75 + [R] * 25, False),
        ([L] * 74 + [R] * 26, True),
    ],
)
def test_gold(choices, is_discarded):
    found = reasons(FAIR + given(choices, kind=GOLD, start=50))
    assert bool(found) == is_discarded
    assert not found or "of which the better is known" in found[0]


def test_a_share_at_its_threshold_is_not_below():
    choices = [L] * 11 + [R] * 9  # 0.55 * 20 is more than 11 in floating point
    assert not reasons(FAIR + given(choices, kind=GOLD, start=50), min_gold_share=0.55)
    assert reasons(FAIR + given(choices, kind=GOLD, start=50), min_gold_share=0.56)


@pytest.mark.parametrize(
    "num_reversed, num_alike, is_discarded",
    [(4, 0, False), (9, 0, False), (10, 0, True), (16, 4, False), (18, 2, True), (60, 40, False)],
)
def test_mirrored_repeats(num_reversed, num_alike, is_discarded):
    first = [L, R] * 50
    repeats = [{L: R, R: L}[choice] if n < num_reversed else choice for n, choice in enumerate(first)]
    found = reasons(given(first) + given(repeats[: num_reversed + num_alike], kind=MIRRORED))
    assert bool(found) == is_discarded
    assert not found or found[0].startswith(f"chose the other one in {num_reversed} of {num_reversed + num_alike}")


def test_ties_are_no_reversals():
    assert not reasons(given([L, R] * 10) + given([T] * 20, kind=MIRRORED))
    assert not reasons(given([T] * 20) + given([L, R] * 10, kind=MIRRORED))


@pytest.mark.parametrize("num_samples, num_gold, num_mirrored", [(40, 5, 4), (100, 5, 10), (200, 10, 20)])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.9], ids=["no difference", "three quarters", "nine tenths"])
def test_honest_raters_are_hardly_ever_discarded(num_samples, num_gold, num_mirrored, share):
    """Who gives the better answer with some probability, and is wrong on one gold pair in ten, under the defaults."""
    generator = random.Random(f"{num_samples}/{share}")

    def judged(number, kind, probability, *, is_flipped):
        is_first = generator.random() < probability
        return Judgement(RATER, f"{number}", kind, L if is_first != is_flipped else R, is_flipped, 5.0)

    discarded = 0
    for _ in range(300):
        judgements = [judged(n, SAMPLE, share, is_flipped=n % 2 > 0) for n in range(num_samples)]
        judgements += [judged(n, MIRRORED, share, is_flipped=n % 2 == 0) for n in range(num_mirrored)]
        judgements += [judged(f"gold {n}", GOLD, 0.9, is_flipped=n % 2 > 0) for n in range(num_gold)]
        discarded += bool(reasons(judgements))
    assert discarded <= 9  # of 300; 3 are expected at most, and ten or more once in 900


@pytest.mark.parametrize("num_gold, least", [(5, 0.4), (10, 0.5)])
def test_who_tosses_a_coin_is_often_found_by_gold(num_gold, least):
    generator = random.Random(0)
    found = [
        bool(reasons(FAIR + given([generator.choice([L, R]) for _ in range(num_gold)], kind=GOLD, start=50)))
        for _ in range(200)
    ]
    assert sum(found) >= least * len(found)


@pytest.mark.parametrize(
    "number, seconds, is_discarded", [(10, 0.9, True), (10, 1.0, False), (8, 0.1, False)], ids=["fast", "limit", "few"]
)
def test_impossibly_fast(number, seconds, is_discarded):
    assert bool(reasons(given([L, R] * (number // 2), seconds=seconds))) == is_discarded


def test_missing_answers_count_only_when_asked():
    assert reasons(FAIR, num_tasks=100) == ()
    assert reasons(FAIR, num_tasks=100, min_answered_share=0.5) == ("answered 20 of 100",)
    assert reasons(FAIR, num_tasks=40, min_answered_share=0.5) == ()
    assert reasons([]) == ()


def test_all_reasons_are_told():
    judgements = given([L] * 20, seconds=0.1) + given([L] * 10, kind=MIRRORED, seconds=0.1)
    flipped = [Judgement(j.rater, j.pair_id, j.kind, j.choice, j.kind == MIRRORED, j.seconds) for j in judgements]
    found = reasons(flipped)
    assert len(found) == 3 and [text.split()[0] for text in found] == ["chose", "chose", "took"]


@pytest.mark.parametrize("options", [{"max_side_share": 1.1}, {"min_gold_share": -0.1}, {"min_median_seconds": -1}])
def test_thresholds_out_of_range_are_refused(options):
    with pytest.raises(StudyError, match=next(iter(options))):
        CheckSettings(**options)
