# SPDX-License-Identifier: Apache-2.0
"""Agreement of raters whose errors are known, and what is advised for the noise that it shows."""

import numpy as np
import pytest

from trl_sipo.evaluation.label_agreement import LABEL, advise, agreements, near_tie_share, turned_labels
from trl_sipo.evaluation.statistics import Interval


def _votes(count, errors, *, shared=0.0, seed=0):
    """Raters of a truth that the chosen sample is better, each wrong at random; the labels' own become 1.

    Args:
        errors: (label, first, second).
        shared: Share of pairs on which both rewards make the same random judgement.
    """
    rng = np.random.default_rng(seed)
    right = [np.where(rng.random(count) < error, -1.0, 1.0) for error in errors]
    is_shared = rng.random(count) < shared
    coin = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    label, first, second = right[0], *(np.where(is_shared, coin, part) for part in right[1:])
    scores = rng.exponential(size=(2, count)) + 0.01
    return {LABEL: np.ones(count), "first": label * first * scores[0], "second": label * second * scores[1]}


@pytest.mark.parametrize("errors", [(0.2, 0.1, 0.3), (0.0, 0.25, 0.25), (0.35, 0.05, 0.2)])
def test_turned_labels_are_estimated_from_rewards_that_err_too(errors):
    votes, prompts = _votes(4000, errors), list(range(4000))
    found = turned_labels(votes, prompts)["first and second"]
    assert found["estimate"] == pytest.approx(errors[0], abs=0.05)
    assert found["low"] <= errors[0] <= found["high"] and found["high"] - found["low"] < 0.15


def test_the_interval_covers_the_truth():
    """In 40 trials of 200 pairs, 95 %: 2 may miss, and 7 hardly can."""
    missed = 0
    for seed in range(40):
        found = turned_labels(_votes(200, (0.2, 0.1, 0.2), seed=seed), list(range(200)))["first and second"]
        missed += not found["low"] <= 0.2 <= found["high"]
    assert missed <= 6


def test_rewards_that_share_their_errors_make_labels_look_noisier():
    alone = turned_labels(_votes(4000, (0.1, 0.1, 0.1)), list(range(4000)))["first and second"]["estimate"]
    shared = turned_labels(_votes(4000, (0.1, 0.1, 0.1), shared=0.4), list(range(4000)))["first and second"]
    assert shared["low"] > alone + 0.03


def test_all_labels_turned():
    votes = _votes(500, (1.0, 0.05, 0.05))
    found = turned_labels(votes, list(range(500)))["first and second"]
    assert 0.9 < found["low"] <= found["estimate"] <= found["high"] <= 1 and found["estimate"] > 0.95


@pytest.mark.parametrize("error", [0.0, 0.02, 0.3, 0.45, 0.6, 0.98, 1.0])
def test_an_estimate_lies_in_its_interval(error):
    """Whether few or most of the labels are turned."""
    found = turned_labels(_votes(300, (error, 0.1, 0.1)), list(range(300)))["first and second"]
    assert 0 <= found["low"] <= found["estimate"] <= found["high"] <= 1


def test_none_turned_may_have_been_missed():
    """Of 50 prompts an event of 7 % is missed in 2.5 % of all cases."""
    votes = {LABEL: np.ones(50), "first": np.ones(50), "second": np.ones(50)}
    found = turned_labels(votes, list(range(50)))["first and second"]
    assert found["estimate"] == found["low"] == 0 and (1 - found["high"]) ** 50 == pytest.approx(0.025, abs=0.005)


def test_rewards_that_say_nothing_give_no_estimate():
    rng = np.random.default_rng(0)
    votes = {LABEL: np.ones(500), "first": rng.normal(size=500), "second": rng.normal(size=500)}
    assert turned_labels(votes, list(range(500))) == {}
    few = {name: column[:20] for name, column in _votes(500, (0.1, 0.1, 0.1)).items()}
    assert turned_labels(few, list(range(20))) == {}


def test_agreements_by_hand():
    votes = {"one": np.array([1.0, 1, 1, -2, np.nan]), "other": np.array([3.0, -1, 0, -1, 1])}
    (found,) = agreements(votes, list("abcde"))
    assert found.num_pairs == 3 and found.agreeing.estimate == pytest.approx(2 / 3)
    assert found.conflict.estimate == pytest.approx(1 / 3)
    assert found.conflict.low == pytest.approx(1 - found.agreeing.high)
    (nothing,) = agreements({"one": np.array([np.nan]), "other": np.array([1.0])}, ["a"])
    assert nothing.agreeing is None and nothing.conflict is None


def test_near_ties():
    assert near_tie_share(np.array([1.0, -1.0, 0.01, -0.01])) == 0.5
    assert near_tie_share(np.array([1.0, np.nan])) is None and near_tie_share(np.ones(5)) is None


def _turned(estimate, low, high):
    return {"first and second": {"estimate": estimate, "low": low, "high": high, "num_pairs": 100}}


EASY = Interval(0.97, 0.93, 0.99)


@pytest.mark.parametrize(
    ("turned", "easiest", "alpha", "smoothing", "words"),
    [
        ({}, None, None, None, "Nothing follows"),
        (_turned(0.3, 0.2, 0.4), None, 8.0, 0.3, "start with a positive `poly_alpha`; 8"),
        (_turned(0.02, 0.0, 0.04), None, 0.0, None, "start with `poly_alpha` 0"),
        (_turned(0.02, 0.0, 0.04), EASY, 0.0, None, "try a negative one, down to -1"),
        (_turned(0.1, 0.02, 0.2), EASY, None, 0.1, "compare `poly_alpha` 0 and 8"),
        (_turned(0.9, 0.8, 0.95), None, None, None, "Turn them around"),
        (_turned(0.52, 0.3, 0.6), None, 8.0, None, "treat the cause"),
        (_turned(0.4, 0.2, 0.5), None, 8.0, None, "treat the cause"),
    ],
    ids=["nothing", "noisy", "clean", "easy", "neither", "turned", "perhaps turned", "too noisy to say how much"],
)
def test_advice(turned, easiest, alpha, smoothing, words):
    advice = advise(turned, easiest)
    assert advice.poly_alpha == alpha and advice.label_smoothing == smoothing and words in advice.words
    assert ("rule of thumb" in advice.words) == (bool(turned) and turned["first and second"]["low"] <= 0.5)
