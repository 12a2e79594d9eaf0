# SPDX-License-Identifier: Apache-2.0
"""The areas of the frontier against other ways to compute them, and how sure they are."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BASE = {"accuracy": 0.8, "second_accuracy": 0.8, "reward": -0.5, "frechet_distance": 10.0, "diversity": 1.2}
UNIT_POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def area(script):
    return script("beyond.area")


# The plane.


def _by_integration(points, cells=200):
    """Share of a fine grid's cells whose middle some point dominates."""
    middles = (np.arange(cells) + 0.5) / cells
    is_dominated = np.zeros((cells, cells), dtype=bool)
    for x, y in points:
        is_dominated |= (middles[:, None] <= x) & (middles[None] <= y)
    return is_dominated.mean()


@settings(max_examples=25, deadline=None)
@given(UNIT_POINTS)
def test_the_area_is_that_of_an_integration(script, points):
    assert script("beyond.area").dominated_area(np.array(points)) == pytest.approx(_by_integration(points), abs=1.1e-2)


@settings(max_examples=25, deadline=None)
@given(UNIT_POINTS, st.tuples(st.floats(0, 1), st.floats(0, 1)), st.randoms(use_true_random=False))
def test_a_point_never_takes_area_away_and_order_does_not_matter(script, points, point, chance):
    dominated_area = script("beyond.area").dominated_area
    before = dominated_area(np.array(points))
    assert dominated_area(np.array([*points, point])) >= before - 1e-12
    chance.shuffle(points)
    assert dominated_area(np.array(points)) == pytest.approx(before)


@settings(max_examples=25, deadline=None)
@given(UNIT_POINTS)
def test_the_frontier_alone_has_the_whole_area(script, points):
    area, points = script("beyond.area"), np.array(points)
    is_on = area.on_frontier(points)
    assert area.dominated_area(points * is_on[:, None]) == pytest.approx(area.dominated_area(points))
    for one in points[is_on]:
        assert not ((points >= one).all(1) & (points > one).any(1)).any()


def test_areas_of_many_draws_are_those_of_each(area):
    points = np.random.default_rng(0).random((6, 5, 2))
    assert area.dominated_area(points) == pytest.approx([area.dominated_area(one) for one in points])
    assert (area.on_frontier(points) == [area.on_frontier(one) for one in points]).all()


@pytest.mark.parametrize(
    ("measured", "quality", "point"),
    [
        ((0.5, 10.0, 0.8, 1.2), "frechet_distance", (0, math.log(4) / math.log(8))),  # the base
        ((1.0, 5.0, 0.8, 1.2), "frechet_distance", (1, 1)),
        ((1.0, 1.0, 0.8, 1.2), "frechet_distance", (1, 1)),
        ((0.75, 40.0, 0.8, 1.2), "frechet_distance", (0.5, 0)),
        ((0.75, 4000.0, 0.8, 1.2), "frechet_distance", (0.5, 0)),
        ((0.75, math.nan, 0.8, 1.2), "frechet_distance", (0.5, 0)),
        ((0.2, 20.0, 0.8, 1.2), "frechet_distance", (0, 1 / 3)),  # loses against the base
        ((0.6, 10.0, 0.7, 1.2), "second_accuracy", (0.2, 0.7)),
        ((0.6, 10.0, 0.7, 0.6), "diversity", (0.2, 0.5)),
        ((0.6, 10.0, 0.7, 2.4), "diversity", (0.2, 1)),  # noise is no merit
    ],
)
def test_a_policy_lies_where_the_protocol_says(area, measured, quality, point):
    assert area.on_plane(np.array(measured), BASE, quality) == pytest.approx(point)


# Runs to points.


def _rows(setting, seed, win_rates, losses=(), rewards=()):
    rows = []
    for position, win_rate in enumerate(win_rates):
        about = {"setting": setting, "seed": seed, "step": 10 * (position + 1), "win_rate": win_rate}
        extra = {"held_out_loss": (*losses, *[1.0] * 9)[position], "reward": (*rewards, *[0.0] * 9)[position]}
        rows.append({**about, "frechet_distance": 10.0, "second_accuracy": 0.8, "diversity": 1.2, **extra})
    return rows


def test_points_are_of_the_seeds_that_all_settings_have(script):
    points_of = script("beyond.points").points_of
    rows = [*_rows("a", 0, [0.6, 0.7]), *_rows("a", 1, [0.8, 0.9]), *_rows("b", 1, [0.5, 0.4])]
    points = points_of(rows)
    assert points.seeds == (1,) and points.policies == (("a", 10), ("a", 20), ("b", 10), ("b", 20))
    assert points.means[:, 0].tolist() == [0.8, 0.9, 0.5, 0.4]
    assert points_of([*_rows("a", 0, [0.6]), *_rows("b", 1, [0.6])]) is None and points_of([]) is None


def test_every_run_is_stopped_by_its_own_criterion(script):
    stopped_early = script("beyond.points").stopped_early
    rows = _rows("a", 0, [0.6, 0.7, 0.8], losses=[0.5, 0.3, math.nan], rewards=[-1, -2, -3])
    rows += _rows("a", 1, [0.1, 0.2, 0.3], losses=[0.5, 0.5, 0.6], rewards=[-3, -2, -1])
    by_loss, by_reward = (stopped_early(rows, name) for name in ("stopped by loss", "stopped by reward"))
    assert by_loss.policies == by_reward.policies == (("a", 0),)
    assert by_loss.values[0, :, 0].tolist() == [0.7, 0.1] and by_reward.values[0, :, 0].tolist() == [0.6, 0.3]


# How sure areas are.


def _points(script, means, noise, seeds, generator):
    """Policies at means of (win rate, Frechet distance), with noise of the win rate that differs between seeds."""
    values = np.tile([0.5, 10.0, 0.8, 1.2], (len(means), seeds, 1))
    values[..., :2] = np.array(means)[:, None]
    values[..., 0] += noise * generator.standard_normal((len(means), seeds))
    policies = tuple((f"{number}", 1) for number in range(len(means)))
    return script("beyond.points").Points(policies, tuple(range(seeds)), values)


def test_a_crossfit_area_is_the_plain_one_where_seeds_agree(script):
    inference = script("beyond.inference")
    points = _points(script, [(0.6, 10.0), (0.8, 20.0), (0.55, 30.0)], 0.0, 5, np.random.default_rng(0))
    one = np.ones((1, 5))
    # By hand: x of 0.2 up to the base's quality, and from there to 0.6 at half of it.
    assert inference.plain_area(points, BASE, one) == pytest.approx(0.2 * 2 / 3 + 0.4 / 3)
    assert inference.crossfit_area(points, BASE, one) == pytest.approx(inference.plain_area(points, BASE, one))
    assert inference.resampled_area(points, BASE).estimate.error == 0.0


def test_more_policies_of_no_merit_raise_the_plain_area_more_than_the_crossfit_one(script):
    """All policies are alike: what more of them seem to gain is luck."""
    inference, generator, one = script("beyond.inference"), np.random.default_rng(1), np.ones((1, 4))
    few, many = (
        np.mean(
            [
                [float(compute(points, BASE, one)[0]) for compute in (inference.plain_area, inference.crossfit_area)]
                for points in (_points(script, [(0.7, 10.0)] * number, 0.05, 4, generator) for _ in range(30))
            ],
            axis=0,
        )
        for number in (1, 12)
    )
    plain, crossfit = many - few
    assert plain > 0.04 and abs(crossfit) < plain / 5


def test_a_resample_counts_every_seed_as_often_as_it_has_it(script):
    inference = script("beyond.inference")
    draws = inference.draws_of(5)
    assert (draws.sum(axis=1) == 5).all() and ((draws > 0).sum(axis=1) >= 2).all() and len(draws) > 1900
    points = _points(script, [(0.6, 10.0), (0.8, 25.0)], 0.05, 3, np.random.default_rng(2))
    twice = inference.plain_area(points, BASE, np.array([[2, 1, 0]]))
    repeated = points.of_seeds([0, 1])
    values = np.concatenate([repeated.values, repeated.values[:, :1]], axis=1)
    as_rows = replace(repeated, seeds=(0, 1, 2), values=values)
    assert twice == pytest.approx(inference.plain_area(as_rows, BASE, np.ones((1, 3))))


def test_the_interval_of_one_policy_is_students(script):
    """Of one policy in the middle the area is linear in its win rate: a mean, for which the interval is known."""
    from scipy.stats import sem, t

    inference = script("beyond.inference")
    points = _points(script, [(0.75, 10.0)], 0.02, 6, np.random.default_rng(3))
    found = inference.resampled_area(points, BASE).estimate.as_record()
    win_rates = points.values[0, :, 0]
    height = 2 * math.log(4) / math.log(8)
    half = height * t.ppf(0.975, 5) * sem(win_rates)
    assert found["value"] == pytest.approx(height * (win_rates.mean() - 0.5), rel=0.02)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)


def test_differences_are_paired_and_cells_independent(script):
    inference = script("beyond.inference")
    first = _points(script, [(0.7, 10.0)], 0.05, 5, np.random.default_rng(4))
    better = replace(first, values=first.values + np.array([0.05, 0, 0, 0]))
    areas = [inference.resampled_area(points, BASE) for points in (first, better)]
    difference = areas[1].minus(areas[0]).estimate
    assert difference.value == pytest.approx(0.1 * 2 / 3) and difference.error < 1e-9 < areas[0].estimate.error
    one = inference.Estimate(0.2, 0.01, 4)
    both = inference.mean_of([one, replace(one, value=0.4)])
    assert both.value == pytest.approx(0.3) and both.error == pytest.approx(0.01 / math.sqrt(2))
    assert both.degrees == pytest.approx(8)
    assert inference.mean_of([one, inference.Estimate(0.4)]).error is None
    assert one.p == pytest.approx(inference.mean_of([one]).p) and 0 < one.p < 1e-4


@pytest.mark.slow
def test_intervals_cover_the_true_area(script):
    inference, generator = script("beyond.inference"), np.random.default_rng(5)
    means = [(0.6, 9.0), (0.75, 14.0), (0.9, 25.0), (0.65, 30.0)]
    truth = inference.plain_area(_points(script, means, 0.0, 1, generator), BASE, np.ones((1, 1)))[0]
    covered = 0
    for _ in range(300):
        found = inference.resampled_area(_points(script, means, 0.02, 5, generator), BASE).estimate.as_record()
        covered += found["low"] <= truth <= found["high"]
    assert covered / 300 >= 0.92  # of 0.95: less by more than two standard errors
