# SPDX-License-Identifier: Apache-2.0
"""Sides are balanced and random, every pair is seen as often as another, and repeats come late."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.annotation.studies import comparisons
from trl_sipo.annotation.plan import check_plan, plan_tasks
from trl_sipo.annotation.records import GOLD, MIRRORED, SAMPLE, Study
from trl_sipo.errors import StudyError


def study(**options) -> Study:
    return Study("Which is better?", **options)


def pairs_of(number, num_gold=0, num_couples=1):
    couples = [("base", f"model-{index}") for index in range(num_couples)]
    return [pair for models in couples for pair in comparisons(number, models=models)] + comparisons(
        0, num_gold=num_gold
    )


def lefts(tasks, pairs):
    """Signed by couple: how much more often the first model is on the left."""
    models = {pair.pair_id: pair.models for pair in pairs}
    balance = Counter()
    for task in tasks:
        balance[models[task.pair_id]] += -1 if task.is_flipped else 1
    return balance.values()


@given(st.integers(1, 23), st.integers(1, 3), st.integers(0, 5), st.integers(0, 2**62), st.integers(0, 7))
def test_sides_of_a_rater_who_gets_all_pairs_differ_by_one_at_most(number, num_couples, num_gold, seed, rater):
    pairs = pairs_of(number, num_gold, num_couples)
    tasks = plan_tasks(pairs, study(seed=seed), 1, rater)
    samples = [task for task in tasks if task.kind == SAMPLE]
    gold = [task for task in tasks if task.kind == GOLD]
    assert sorted(task.pair_id for task in tasks) == sorted(pair.pair_id for pair in pairs)
    assert all(abs(balance) <= 1 for balance in lefts(samples, pairs))
    assert abs(sum(1 if task.is_flipped else -1 for task in gold)) <= 1


@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 2**62))
def test_a_pair_is_seen_either_way_as_often_within_a_group_but_for_one(number, num_raters, seed):
    pairs = pairs_of(number)
    plans = [plan_tasks(pairs, study(seed=seed), 2, rater) for rater in range(num_raters)]
    balance = Counter()
    for task in (task for tasks in plans for task in tasks):
        balance[task.pair_id] += -1 if task.is_flipped else 1
    assert set(balance) == {pair.pair_id for pair in pairs}
    assert all(abs(value) <= 1 for value in balance.values())


@given(st.data())
def test_shares_cover_all_pairs_as_evenly_as_can_be(data):
    number, num_couples = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 3))
    pairs = pairs_of(number, num_couples=num_couples)
    size, num_raters = data.draw(st.integers(1, len(pairs))), data.draw(st.integers(1, 8))
    settings = study(seed=data.draw(st.integers(0, 2**62)), tasks_per_rater=size)
    plans = [plan_tasks(pairs, settings, 1, rater) for rater in range(num_raters)]
    assert all(len({task.pair_id for task in tasks}) == len(tasks) == size for tasks in plans)
    seen = Counter({pair.pair_id: 0 for pair in pairs})
    seen.update(task.pair_id for tasks in plans for task in tasks)
    assert max(seen.values()) - min(seen.values()) <= 1
    assert all(abs(balance) <= 3 for tasks in plans for balance in lefts(tasks, pairs))
    models = {pair.pair_id: pair.models for pair in pairs}
    for tasks in plans:
        by_couple = Counter({pair.models: 0 for pair in pairs})
        by_couple.update(models[task.pair_id] for task in tasks)
        assert max(by_couple.values()) - min(by_couple.values()) <= 2  # one, and one more where laps touch


@given(st.data())
def test_mirrored_repeats_exchange_the_sides_and_come_well_after_the_pair(data):
    number, num_gold = data.draw(st.integers(2, 60)), data.draw(st.integers(0, 6))
    num_mirrored = data.draw(st.integers(0, number // 2))
    settings = study(seed=data.draw(st.integers(0, 2**62)), num_mirrored=num_mirrored)
    tasks = plan_tasks(pairs_of(number, num_gold), settings, 1, data.draw(st.integers(0, 5)))
    first = {task.pair_id: (place, task) for place, task in enumerate(tasks) if task.kind == SAMPLE}
    repeats = [(place, task) for place, task in enumerate(tasks) if task.kind == MIRRORED]
    assert len(repeats) == len({task.pair_id for _, task in repeats}) == num_mirrored
    assert len(tasks) == number + num_gold + num_mirrored
    for place, task in repeats:
        before, original = first[task.pair_id]
        assert task.is_flipped != original.is_flipped
        assert place - before > min(20, (number + num_gold) // 2)


def test_sides_and_orders_are_as_likely_either_way():
    """Over many seeds; a fair coin lies within four standard deviations."""
    pairs, num_seeds = pairs_of(7, 1), 600
    plans = [plan_tasks(pairs, study(seed=seed), 1, 0) for seed in range(num_seeds)]
    for pair in pairs:
        flipped = sum(task.is_flipped for tasks in plans for task in tasks if task.pair_id == pair.pair_id)
        assert abs(flipped - num_seeds / 2) < 4 * (num_seeds / 4) ** 0.5
    firsts = Counter(tasks[0].pair_id for tasks in plans)
    expected = num_seeds / len(pairs)
    assert set(firsts) == {pair.pair_id for pair in pairs}
    assert all(abs(number - expected) < 4 * expected**0.5 for number in firsts.values())


def test_raters_and_groups_have_orders_of_their_own_that_the_seed_repeats():
    pairs = pairs_of(12)
    plans = [plan_tasks(pairs, study(seed=3), group, rater) for group in (1, 2) for rater in range(4)]
    assert len({tuple(tasks) for tasks in plans}) == 8
    assert len({tuple(task.pair_id for task in tasks) for tasks in plans}) == 8
    sides = [tuple(sorted((task.pair_id, task.is_flipped) for task in tasks)) for tasks in plans]
    assert len(set(sides)) == 8
    assert plan_tasks(pairs, study(seed=3), 2, 1) == plans[5]
    assert plan_tasks(pairs, study(seed=4), 2, 1) != plans[5]


@pytest.mark.parametrize(
    "numbers, words",
    [
        ((0, None, 0), "no pairs"),
        ((4, 5, 0), "from 1 to 4"),
        ((4, 0, 0), "from 1 to 4"),
        ((4, None, 3), "from 0 to 2"),
    ],
)
def test_numbers_that_cannot_be_had_are_refused(numbers, words):
    with pytest.raises(StudyError, match=words):
        check_plan(*numbers)
