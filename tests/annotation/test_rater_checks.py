# SPDX-License-Identifier: Apache-2.0
"""Who is discarded, and who is not, on either side of each threshold."""

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
    [([L, R], False), ([R, T], True), ([L] * 6 + [R] * 2, False), ([L] * 5 + [R, T], True), ([R], False)],
    ids=["one wrong", "two wrong", "three quarters right", "fewer", "one"],
)
def test_gold(choices, is_discarded):
    found = reasons(FAIR + given(choices, kind=GOLD, start=50))
    assert bool(found) == is_discarded
    assert not found or "of which the better is known" in found[0]


@pytest.mark.parametrize(
    "repeats, is_discarded",
    # The first time it was L, R, L, R, ...
    [([R, L, R], False), ([R, L, R, R], True), ([R, L, R, L, L], True), ([R, L, L, R, L], False), ([T] * 4, False)],
    ids=["three", "three of four", "four of five", "two of five", "ties"],
)
def test_mirrored_repeats(repeats, is_discarded):
    found = reasons(FAIR + given(repeats, kind=MIRRORED))
    assert bool(found) == is_discarded
    assert not found or "mirrored repeats" in found[0]


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
    judgements = given([L] * 20, seconds=0.1) + given([L] * 9, kind=MIRRORED, seconds=0.1)
    flipped = [Judgement(j.rater, j.pair_id, j.kind, j.choice, j.kind == MIRRORED, j.seconds) for j in judgements]
    found = reasons(flipped)
    assert len(found) == 3 and [text.split()[0] for text in found] == ["chose", "chose", "took"]


@pytest.mark.parametrize("options", [{"max_side_share": 1.1}, {"min_gold_share": -0.1}, {"min_median_seconds": -1}])
def test_thresholds_out_of_range_are_refused(options):
    with pytest.raises(StudyError, match=next(iter(options))):
        CheckSettings(**options)
