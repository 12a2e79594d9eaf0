# SPDX-License-Identifier: Apache-2.0
"""Votes in two stages, by hand: every kind of tie at each stage."""

import pytest

from tests.annotation.studies import comparisons
from trl_sipo.annotation.records import GOLD, MIRRORED, SAMPLE, SKIP, Answer, Rater, Task
from trl_sipo.annotation.votes import (
    Judgement,
    final_label,
    group_label,
    last_judgements,
    mirrored_labels,
    votes,
    worth,
)

F, S, T = "first", "second", "tie"


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([F, F, F, S], F),
        ([F, F, S, S], T),  # "in case of a tie among the 4 annotators, the group level label is recorded as a tie"
        ([F, F, S, T], F),  # given most often, though not by more than half
        ([F, S, T, T], T),
        ([F, F, T, T], T),
        ([S], S),
        ([F, S, T], T),
    ],
)
def test_a_group_says_what_most_of_it_say(labels, expected):
    assert group_label(labels) == group_label(labels[::-1]) == expected


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([F, F, F], F),
        ([S, S, T], S),  # "one label still appears at least twice"
        ([F, S, T], T),  # "do not produce a strict majority"
        ([T, T, F], T),
        ([F, S], T),  # of two groups, one is no majority
        ([S], S),
        ([F, F, S, S], T),
        ([F, F, S, T], T),  # two of four are no more than half
    ],
)
def test_the_groups_say_what_more_than_half_of_them_say(labels, expected):
    assert final_label(labels) == final_label(labels[::-1]) == expected


def judgement(group, choice, *, pair="pair-tuned-0", kind=SAMPLE, is_flipped=False, rater=1, seconds=1.0):
    return Judgement(Rater(rater, f"rater-{rater}", group), pair, kind, choice, is_flipped, seconds)


def test_a_pair_by_hand():
    """Group 1: the second by 2 of 3. Group 2: a tie, 1 to 1. Group 3: the second. Of these labels two are "second".
    Of the six answers four are for the second and two for the first."""
    given = [
        judgement(1, "right"),
        judgement(1, "left", is_flipped=True),  # the second was on the left
        judgement(1, "left"),
        judgement(2, "left"),
        judgement(2, "right"),
        judgement(3, "right"),
        judgement(3, "left", kind=MIRRORED),  # counts in no vote
        judgement(3, "left", kind=GOLD, pair="gold-tuned-0"),
    ]
    (vote,) = votes(comparisons(2), given)
    assert vote.group_labels == {1: S, 2: T, 3: S} and vote.label == S
    assert vote.counts == {F: 2, S: 4, T: 0} and vote.num_answers == 6
    assert vote.share_of_second == pytest.approx(4 / 6)


def test_majorities_in_groups_may_differ_from_that_of_all_answers():
    """Two groups say "first" by 2 to 1, one says "second" by 3 to 0: final "first", though 5 of 9 said "second"."""
    given = [judgement(group, choice) for group in (1, 2) for choice in ("left", "left", "right")]
    (vote,) = votes(comparisons(1), [*given, *[judgement(3, "right")] * 3])
    assert vote.label == F and vote.share_of_second == pytest.approx(5 / 9)


def test_worth():
    assert [worth(label) for label in (F, T, S)] == [0.0, 0.5, 1.0]


def answer(number, assignment, choice, seconds=2.0, kind=SAMPLE, is_flipped=False):
    return Answer(number, Rater(1, "rater-01", 1), assignment, 0, Task("p", kind, is_flipped), choice, seconds, 0.0)


def test_the_last_answer_counts_and_time_adds_up():
    given = [answer(1, "a", "left"), answer(2, "b", "right"), answer(3, "a", "tie", 3.0), answer(4, "b", SKIP)]
    (last,) = last_judgements(given)
    assert last.choice == "tie" and last.seconds == 5.0
    assert last_judgements([*given, answer(5, "b", "left")])[1].choice == "left"


def test_labels_follow_the_sides():
    labels = [judgement(1, choice, is_flipped=flip).label for choice in ("left", "right") for flip in (False, True)]
    assert labels == [F, S, S, F] and judgement(1, "tie", is_flipped=True).label == T


def test_mirrored_repeats_are_paired_by_rater_and_pair():
    given = [
        judgement(1, "left", rater=1),
        judgement(1, "left", rater=1, kind=MIRRORED, is_flipped=True),
        judgement(1, "right", rater=2),
        judgement(1, "tie", rater=3, kind=MIRRORED),  # whose first answer is missing
    ]
    assert mirrored_labels(given) == [(F, S)]
