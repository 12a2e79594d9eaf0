# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests of win rates: closed forms, an independent bootstrap, and coverage by simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from benchmarks.interval_coverage import measure
from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.statistics import by_cluster, clustered_interval, holm, sign_flip_test
from trl_sipo.evaluation.win_rates import compare, paired_outcomes


def test_values_are_summed_by_cluster():
    clusters = by_cluster([1.0, 0.0, 0.5, 1.0], ["a", "b", "a", "c"])
    assert clusters.sums.tolist() == [1.5, 0.0, 1.0] and clusters.counts.tolist() == [2, 1, 1]
    assert clusters.mean == pytest.approx(2.5 / 4)


@pytest.mark.parametrize("values, keys", [([], []), ([1.0], ["a", "b"]), ([1.0, float("nan")], ["a", "b"])])
def test_what_cannot_be_averaged_is_refused(values, keys):
    with pytest.raises(ConfigurationError):
        by_cluster(values, keys)


def test_clusters_of_one_give_the_interval_of_independent_trials():
    values = np.random.default_rng(0).normal(size=400)
    interval = clustered_interval(by_cluster(values, range(400)), num_resamples=4000)
    expected = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.01)
    assert interval.estimate == pytest.approx(values.mean())


def test_the_same_outcomes_within_a_prompt_count_once():
    prompts = np.random.default_rng(1).integers(0, 2, 30).astype(float)
    once = clustered_interval(by_cluster(prompts, range(30)), bounds=(0, 1))
    repeated = clustered_interval(by_cluster(np.repeat(prompts, 8), np.repeat(np.arange(30), 8)), bounds=(0, 1))
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))
    independent = clustered_interval(by_cluster(np.repeat(prompts, 8), range(240)), bounds=(0, 1))
    assert independent.high - independent.low < 0.6 * (once.high - once.low)


def test_agreement_of_all_prompts_is_no_certainty():
    always = clustered_interval(by_cluster([1.0] * 20, range(20)), bounds=(0, 1))
    # Clopper and Pearson: twenty successes of twenty.
    low = stats.binomtest(20, 20).proportion_ci(method="exact").low
    assert (always.estimate, always.high) == (1.0, 1.0) and always.low == pytest.approx(low)
    ties = clustered_interval(by_cluster([0.5] * 20, range(20)), bounds=(0, 1))
    assert ties.low < 0.5 < ties.high
    unbounded = clustered_interval(by_cluster([0.0] * 20, range(20)))
    assert (unbounded.low, unbounded.high) == (-np.inf, np.inf)
    one = clustered_interval(by_cluster([1.0, 0.0], ["a", "a"]), bounds=(0, 1))
    assert (one.low, one.high) == (0, 1)


def test_few_prompts_try_every_flip():
    net = np.array([3.0, -1.0, 2.0, 0.5, 4.0])
    sums = [abs(np.dot(signs, net)) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([value >= abs(net.sum()) - 1e-9 for value in sums])
    assert sign_flip_test(by_cluster(net, range(5))) == pytest.approx(expected)
    assert sign_flip_test(by_cluster([0.5] * 5, range(5)), null=0.5) == 1.0


def test_many_prompts_agree_with_an_independent_permutation_test():
    values = np.random.default_rng(3).normal(0.25, 1, 60)
    expected = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    ).pvalue
    assert sign_flip_test(by_cluster(values, range(60))) == pytest.approx(expected, abs=0.015)


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_ties_count_one_half_and_the_direction_of_the_reward_is_kept():
    assert paired_outcomes([1, 2, 3], [2, 2, 1]).tolist() == [1.0, 0.5, 0.0]
    assert paired_outcomes([1, 2, 3], [2, 2, 1], higher_is_better=False).tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(ConfigurationError, match="3 scores of the base and 2"):
        paired_outcomes([1, 2, 3], [1, 2])


def test_a_comparison_sums_up_both_models():
    generator = np.random.default_rng(5)
    base = generator.normal(size=160)
    result = compare(base, base + generator.normal(0.5, 0.5, 160), np.repeat(np.arange(40), 4))
    assert (result.num_samples, result.num_prompts, result.num_ties) == (160, 40, 0)
    assert result.win_rate.low > 0.7 and result.difference.low > 0.35 and result.win_p_value < 0.001
    assert result.difference.low < 0.5 < result.difference.high
    same = compare(base, base, np.repeat(np.arange(40), 4))
    assert (same.win_rate.estimate, same.win_p_value, same.num_ties) == (0.5, 1.0, 160)


@pytest.mark.parametrize("num_prompts, win_rate", [(8, 0.9), (20, 0.5)])
def test_intervals_cover_the_truth_as_often_as_they_say(num_prompts, win_rate):
    row = measure(num_prompts, win_rate, trials=300, num_resamples=499)
    # Three standard errors of 300 trials below 0.95.
    assert row["coverage"] > 0.912
    if win_rate == 0.5:
        assert row["rejected"] < 0.05 + 0.038
    else:  # what the plain bootstrap gets wrong, and this test would not miss
        assert row["percentile_coverage"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("num_prompts", [8, 20, 50, 200])
@pytest.mark.parametrize("win_rate", [0.5, 0.7, 0.9])
def test_intervals_cover_the_truth_everywhere(num_prompts, win_rate):
    row = measure(num_prompts, win_rate, trials=1000)
    assert row["coverage"] > 0.93
    assert win_rate != 0.5 or row["rejected"] < 0.072


@pytest.mark.parametrize("num_others", [1, 2, 3])
def test_a_few_prompts_that_differ_do_not_take_all_certainty_away(num_others):
    # In more than 2.5 % of the resamples none of them is drawn; a bootstrap-t then has no end on that side.
    wins = np.ones(200)
    wins[:num_others] = 0
    interval = clustered_interval(by_cluster(wins, range(200)), bounds=(0, 1))
    exact = stats.binomtest(200 - num_others, 200).proportion_ci(method="exact")
    assert exact.low - 0.012 < interval.low <= exact.low and interval.high <= 1
    ties = np.full(200, 0.5)
    ties[:num_others] = 1
    interval = clustered_interval(by_cluster(ties, range(200)), bounds=(0, 1))
    assert 0.48 < interval.low < 0.5 < interval.high < 0.53, "two wins of 200 say nothing of who wins"
    gains = clustered_interval(by_cluster(2 * ties - 1, range(200)))
    assert -0.04 < gains.low < 0 < gains.high < 0.06


def test_an_interval_has_the_unit_of_its_values():
    values = np.random.default_rng(2).normal(0.1, 1, 40)
    one, small = (clustered_interval(by_cluster(scale * values, range(40))) for scale in (1.0, 1e-14))
    assert (1e-14 * one.low, 1e-14 * one.high) == pytest.approx((small.low, small.high), rel=1e-9, abs=0)


@pytest.mark.parametrize("share", [0.03, 0.1])
def test_intervals_cover_where_nearly_all_samples_tie(share):
    generator, covered = np.random.default_rng(0), 0
    for trial in range(200):
        outcomes = np.where(generator.random(100) < share, generator.choice([0.0, 1.0], 100), 0.5)
        interval = clustered_interval(by_cluster(outcomes, range(100)), bounds=(0, 1), num_resamples=299, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert covered / 200 > 0.9


def test_one_heavy_cluster_beside_a_few_of_another_mean():
    """So little is known that the far end is the bound itself."""
    heavy = by_cluster([1.0] * 90 + [0.0] * 10, [0] * 90 + list(range(1, 11)))
    found = clustered_interval(heavy, level=0.99, bounds=(0.0, 1.0))
    assert found.estimate == 0.9 and found.low == 0 and found.high == pytest.approx(1.0)
