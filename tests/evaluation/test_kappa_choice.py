# SPDX-License-Identifier: Apache-2.0
"""Win rates by kappa against populations whose optimum is computed outright, and the noise of labels by hand."""

import numpy as np
import pytest

from trl_sipo.core.objectives.proximal import kappa_for_win_rate, optimal_win_rate
from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.kappa_choice import (
    ALWAYS,
    AS_NOISY,
    MOST_ROUNDS,
    NEVER,
    OFF,
    LabelNoise,
    acting_kappa,
    guarantee,
    kappa_for,
    kappa_interval,
    known_noise,
    noise_by_scores,
    noise_of_votes,
    surest_guarantee,
    win_rate,
    win_rate_by_such_judges,
    win_rate_interval,
)
from trl_sipo.evaluation.statistics import Interval

SAMPLES = 801  # of the populations: places in the true order
PLACES = (np.arange(SAMPLES) + 0.5) / SAMPLES
# How often the sample of the row is truly better than that of the column; against itself, one half.
TRUTH = (np.sign(PLACES[:, None] - PLACES[None]) + 1) / 2
CLOSE = 1e-4  # what a population of so many leaves of the continuous one


def _labelled(turned):
    """How often the sample of the row is labelled the better one, where a share is turned."""
    return TRUTH * (1 - turned) + (1 - TRUTH) * turned


def _optimum(reference, labelled, kappa):
    """`p_ref (1 + (P(win | x) - 1/2) / kappa)`, (samples,)."""
    found = reference * (1 + (labelled @ reference - 0.5) / kappa)
    assert found.min() >= -1e-12 and found.sum() == pytest.approx(1)
    return found


@pytest.mark.parametrize(("kappa", "noise"), [(0.5, 0.0), (0.8, 0.0), (0.5, 0.2), (3.0, 0.35), (0.3, 0.2)])
def test_a_population_with_turned_labels_wins_as_said(kappa, noise):
    base = np.full(SAMPLES, 1 / SAMPLES)
    policy = _optimum(base, _labelled(noise), kappa)
    assert policy @ TRUTH @ base == pytest.approx(win_rate(kappa, noise), abs=CLOSE)
    assert policy @ _labelled(noise) @ base == pytest.approx(win_rate_by_such_judges(kappa, noise), abs=CLOSE)
    assert win_rate(kappa, noise) == pytest.approx(0.5 + (1 - 2 * noise) / (12 * kappa))
    assert win_rate_by_such_judges(kappa, noise) == pytest.approx(0.5 + (1 - 2 * noise) ** 2 / (12 * kappa))
    # The same policy as of clean labels with the kappa that acts.
    assert policy == pytest.approx(_optimum(base, TRUTH, acting_kappa(kappa, noise)))


def test_drawn_pairs_win_as_said():
    """From labels that were drawn and turned by chance to contests that were."""
    draw, kappa, noise, number = np.random.default_rng(0), 0.7, 0.25, 400_000
    first, second = draw.integers(SAMPLES, size=(2, number))
    is_better = (TRUTH[first, second] > draw.random(number)) ^ (draw.random(number) < noise)
    won = np.bincount(first, is_better, SAMPLES) + np.bincount(second, ~is_better, SAMPLES)
    seen = np.bincount(first, minlength=SAMPLES) + np.bincount(second, minlength=SAMPLES)
    weight = 1 + (won / seen - 0.5) / kappa
    policy = draw.choice(SAMPLES, number, p=weight / weight.sum())
    wins = TRUTH[policy, draw.integers(SAMPLES, size=number)].mean()
    assert wins == pytest.approx(win_rate(kappa, noise), abs=0.004)  # four standard errors


def test_noise_that_is_rarer_far_apart_wins_more():
    """And so much more as the comparison of the best with the worst of three samples says."""
    base, kappa = np.full(SAMPLES, 1 / SAMPLES), 0.6
    turned = 0.5 * np.exp(-4 * abs(PLACES[:, None] - PLACES[None]))
    wins = _optimum(base, _labelled(turned), kappa) @ TRUTH @ base
    mean = turned.mean()
    assert 0.1 < mean < 0.25 and wins > win_rate(kappa, mean) + 0.01
    three = np.sort(np.random.default_rng(0).random((200_000, 3)), axis=1)
    extra = (1 - np.exp(-4 * (three[:, 2] - three[:, 0]))).mean()  # how much more often right than wrong
    assert wins == pytest.approx(0.5 + extra / (12 * kappa), abs=1e-3)


@pytest.mark.parametrize(("kappa", "noise"), [(0.5, 0.0), (0.9, 0.0), (0.5, 0.2), (2.0, 0.1)])
def test_rounds_whose_reference_is_the_last_policy(kappa, noise):
    base = policy = np.full(SAMPLES, 1 / SAMPLES)
    for rounds in range(1, MOST_ROUNDS + 1):
        policy = _optimum(policy, _labelled(noise), kappa)
        assert policy @ TRUTH @ base == pytest.approx(win_rate(kappa, noise, rounds=rounds), abs=CLOSE)


def test_rounds_at_one_half_are_powers_of_two():
    """`G(v) = v^2`, so that n rounds draw from the best of 2^n."""
    rates = [win_rate(0.5, rounds=n) for n in range(1, MOST_ROUNDS + 1)]
    assert rates == pytest.approx([2**n / (2**n + 1) for n in range(1, MOST_ROUNDS + 1)], abs=1e-14)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("rounds", range(1, MOST_ROUNDS + 1))
@pytest.mark.parametrize("wanted", [0.5001, 0.55, 0.66, 0.75, 0.85, 0.95])
def test_the_kappa_for_a_win_rate_wins_it(wanted, rounds, noise):
    kappa = kappa_for(wanted, noise, rounds=rounds)
    if wanted > 2**rounds / (2**rounds + 1):
        assert kappa is None
    else:
        assert win_rate(kappa, noise, rounds=rounds) == pytest.approx(wanted, abs=1e-9)
        assert guarantee(kappa, noise) == (ALWAYS if kappa >= 0.5 else AS_NOISY)


def test_clean_labels_are_the_closed_form_of_core():
    assert win_rate(0.8) == optimal_win_rate(0.8) == win_rate_by_such_judges(0.8, 0.0)
    assert kappa_for(0.6) == kappa_for_win_rate(0.6) == pytest.approx(5 / 6)


def test_which_kappa_has_an_optimum():
    """Its density must not be negative anywhere: the least that a sample wins, with noise, is the noise."""
    assert guarantee(0.5) == guarantee(7.0, 0.3) == ALWAYS and guarantee(0.0) == guarantee(0.0, 0.3) == OFF
    assert guarantee(0.499) == guarantee(0.19, 0.3) == NEVER and guarantee(0.21, 0.3) == AS_NOISY
    base = np.full(SAMPLES, 1 / SAMPLES)
    density = [(1 + (_labelled(0.3) @ base - 0.5) / kappa).min() for kappa in (0.19, 0.21)]
    assert density[0] < 0 < density[1]


# ------------------------------------------------------------------------------------------------------- label noise


def test_votes_by_hand():
    found = noise_of_votes(np.array([0.8, 0.1, 1.0, 0.5]), ["a", "a", "b", "c"])
    assert found.share.estimate == pytest.approx((0.2 + 0.1 + 0 + 0.5) / 4) and found.num_pairs == 4
    assert (found.source, found.share.low < found.share.estimate < found.share.high) == ("labels", True)
    assert noise_of_votes(np.array([1.0, 0.0, 0.5]), list("abc")) is None, "which arm, or none, and no votes"
    assert noise_of_votes(np.array([]), []) is None


def test_scores_by_hand():
    """Two of five contradict, one is a tie, and one is not known; what never contradicts comes first."""
    mixed = np.array([1.0, -2.0, 0.5, -1.0, 0.0, np.nan])
    found = noise_by_scores({"mixed": mixed, "none": mixed * np.nan, "same": mixed**2 + 1}, list("abcdef"))
    assert [noise.name for noise in found] == ["same", "mixed"]
    assert found[1].share.estimate == pytest.approx(0.5) and found[1].num_pairs == 5
    assert found[0].share.low == found[0].share.estimate == 0 < found[0].share.high


def test_the_share_of_turned_labels_is_found():
    """Of pairs that come ten to a prompt, the noise of a prompt of its own, 0.2 on the mean."""
    draw = np.random.default_rng(1)
    by_prompt = draw.choice([0.05, 0.35], 200)
    turned = draw.random((200, 10)) < by_prompt[:, None]
    differences = np.where(turned, -1.0, 1.0).ravel() * draw.random(2000)
    (found,) = noise_by_scores({"judge": differences}, np.arange(200).repeat(10).tolist())
    assert found.share.low < 0.2 < found.share.high
    spread = 4 * np.sqrt(0.2 * 0.8 / 2000)  # of pairs that do not hang together; here they do
    assert spread < found.share.high - found.share.low < 0.1


def test_doubt_of_the_noise_is_doubt_of_the_kappa():
    noise = LabelNoise(Interval(0.2, 0.1, 0.3), "labels", num_pairs=50)
    kappa, wins = kappa_interval(0.55, noise), win_rate_interval(1.0, noise)
    assert (kappa.estimate, kappa.low, kappa.high) == pytest.approx(
        tuple(kappa_for(0.55, share) for share in (0.2, 0.3, 0.1))
    )
    assert (wins.estimate, wins.low, wins.high) == pytest.approx(
        tuple(win_rate(1.0, share) for share in (0.2, 0.3, 0.1))
    )
    useless = LabelNoise(Interval(0.5, 0.4, 0.6), "scores", "x", 50)
    assert kappa_interval(0.55, useless) is win_rate_interval(1.0, useless) is None
    doubtful = LabelNoise(Interval(0.4, 0.3, 0.6), "scores", "x", 50)
    assert win_rate_interval(1.0, doubtful).low == 0.5 and kappa_interval(0.55, doubtful).low == 0
    assert surest_guarantee(0.3, noise) == NEVER and guarantee(0.3, 0.2) == AS_NOISY  # 0.3 / 0.8 and 0.3 / 0.6
    assert surest_guarantee(0.45, noise) == AS_NOISY and surest_guarantee(0.45, useless) == NEVER
    assert win_rate_interval(0.3, noise) is None and win_rate_interval(0.45, noise).high < 2 / 3
    assert kappa_interval(0.7, noise) is win_rate_interval(0.1, noise) is win_rate_interval(0.0, noise) is None


@pytest.mark.parametrize("share", [-0.01, 0.5, 20.0, float("nan"), float("inf")])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ConfigurationError, match="label_noise=.*below 0.5"):
        known_noise(share, "given")
