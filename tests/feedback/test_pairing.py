# SPDX-License-Identifier: Apache-2.0
"""Pairs from scores: worked examples, properties, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.feedback.pairing import (
    COMBINATIONS,
    SampleScores,
    agreement_rate,
    conflicts,
    make_pairs,
    top_samples,
)


def scored(prompt_ids, *, lower=(), **scores):
    arrays = {name: np.array(values, dtype=float) for name, values in scores.items()}
    return SampleScores(prompt_ids, arrays, {name: name not in lower for name in arrays})


def indices(pairs):
    return [(pair.chosen, pair.rejected) for pair in pairs]


TWO_PROMPTS = ["a", "a", "a", "b", "b"]


def test_best_and_worst_of_each_prompt():
    samples = scored(TWO_PROMPTS, r=[1, 3, 2, 5, 5])
    pairs = make_pairs(samples)
    assert indices(pairs) == [(1, 0)] and pairs[0].prompt_id == "a"
    assert pairs[0].margin == pytest.approx(2 / np.std([1, 3, 2, 5, 5]))


def test_all_pairs_above_a_margin_are_sorted_by_it():
    samples = scored(TWO_PROMPTS, r=[1, 3, 2, 5, 9])
    deviation = np.std([1, 3, 2, 5, 9])
    assert indices(make_pairs(samples, selection="all")) == [(1, 0), (1, 2), (2, 0), (4, 3)]
    assert indices(make_pairs(samples, selection="all", min_margin=1.5 / deviation)) == [(1, 0), (4, 3)]


def test_lower_may_be_better():
    assert indices(make_pairs(scored(["a", "a"], lower="r", r=[1, 2]))) == [(0, 1)]


def test_rewards_are_combined_on_one_scale():
    # In its own unit the second reward would decide everything.
    samples = scored(["a", "a", "b", "b"], small=[0, 2, 1, 0], large=[100, 0, 100, 0])
    assert indices(make_pairs(samples, combine="weighted", weights={"small": 3.0})) == [(1, 0), (2, 3)]
    assert indices(make_pairs(samples, combine="weighted", weights={"large": 9.0})) == [(0, 1), (2, 3)]
    assert indices(make_pairs(samples, combine="consensus")) == [(2, 3)]


def test_pareto_takes_a_tie_of_one_reward_and_consensus_does_not():
    samples = scored(["a", "a", "b", "b"], first=[1, 1, 0, 2], second=[0, 1, 1, 0])
    assert indices(make_pairs(samples, combine="consensus")) == []
    assert indices(make_pairs(samples, combine="pareto")) == [(1, 0)]


def test_the_margin_of_a_consensus_is_that_of_the_least_convinced():
    samples = scored(["a", "a", "b", "b"], first=[0, 4, 0, 0], second=[0, 1, 4, 3])
    [pair] = [pair for pair in make_pairs(samples, combine="consensus") if pair.prompt_id == "a"]
    assert pair.margin == pytest.approx(1 / np.std([0, 1, 4, 3]))


def test_conflicts_count_each_pair_of_samples_of_a_prompt_once():
    samples = scored(["a", "a", "a", "b", "b"], first=[1, 2, 3, 1, 2], second=[3, 2, 1, 1, 1], third=[1, 2, 3, 1, 2])
    by_names = {(found.first, found.second): found for found in conflicts(samples)}
    against = by_names["first", "second"]
    assert (against.num_pairs, against.num_ties, against.conflict_rate) == (3, 1, 1.0)
    assert by_names["first", "third"].conflict_rate == 0.0
    assert agreement_rate(scored(["a", "a", "a"], first=[1, 2, 3], second=[1, 3, 2])) == pytest.approx(2 / 3)


def test_the_best_samples_are_kept_for_supervised_training():
    samples = scored(TWO_PROMPTS, r=[1, 3, 2, 5, 9])
    assert top_samples(samples) == [1, 4]
    assert top_samples(samples, num_per_prompt=2) == [1, 2, 4, 3]
    assert top_samples(samples, num_per_prompt=2, quantile=0.5) == [1, 4, 3]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"selection": "some"}, "best_worst"),
        ({"combine": "mean"}, "pareto"),
        ({"min_margin": -1}, "min_margin=-1"),
        ({"weights": {"q": 1.0}}, "['q']"),
        ({"weights": {"r": 0.0}}, "positive"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ConfigurationError) as error:
        make_pairs(scored(["a", "a"], r=[1, 2]), **options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "values, words", [([0.1, 0.1], "scores all 2 samples 0.1"), ([1, np.nan], "1 finite scores for 2")]
)
def test_scores_that_prefer_nothing_are_refused(values, words):
    with pytest.raises(DatasetError, match=words):
        make_pairs(scored(["a", "a"], r=values))


SCORES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=6)


@given(scores=SCORES, combine=st.sampled_from(sorted(COMBINATIONS)), scale=st.sampled_from([0.01, 7.0]))
def test_a_preference_has_no_cycle_of_two_and_no_unit(scores, combine, scale):
    first, second = (np.array(column, dtype=float) for column in zip(*scores, strict=True))
    if first.std() == 0 or second.std() == 0:
        return
    names = ["a"] * len(scores)
    pairs = indices(make_pairs(scored(names, x=first, y=second), selection="all", combine=combine))
    assert not {(rejected, chosen) for chosen, rejected in pairs} & set(pairs)
    rescaled = make_pairs(
        scored(names, x=scale * first + 3, y=second), selection="all", combine=combine, min_margin=1e-9
    )
    assert combine == "weighted" or set(indices(rescaled)) == set(pairs)  # a weighted mean may round to a tie
    if combine == "consensus":
        assert all(first[i] > first[j] and second[i] > second[j] for i, j in pairs)
