# SPDX-License-Identifier: Apache-2.0
"""Which kappa of the proximal term wins how often against the base model, by its closed form, and what noise changes.

Say that the samples of a prompt have a true order without ties, `u` in [0, 1] the place of a sample in it, and that a
label is turned with probability e, whatever the pair. Then `P(win | x) - 1/2 = (1 - 2e) (u - 1/2)`, so that the
optimum of `core.objectives.proximal`, `p_ref (1 + (P(win | x) - 1/2) / kappa)`, is that of clean labels with

    acting kappa = kappa / (1 - 2e)

It wins `1/2 + (1 - 2e) / (12 kappa)` by the true order, and `1/2 + (1 - 2e)^2 / (12 kappa)` by judges who err as often
as the labels. If labels are turned more rarely the farther apart two samples are in the order, it wins more: of three
samples, let g be how much more often than not the best one is labelled better than the worst; the win rate is then
`1/2 + mean(g) / (12 kappa)`, for the other comparisons of the three cancel, and g is at least what a pair has on the
mean, 1 - 2e.

**Rounds.** With the policy of a round as the reference of the next, on pairs that it drew itself, the share of samples
below place v in the reference becomes `G(v) = v + (v^2 - v) / (2 kappa)` in the optimum, whatever the reference is. So
n rounds win `1 - integral of G applied n times`, which is 2/3, 4/5, 8/9 at kappa = 1/2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trl_sipo.core.objectives.proximal import BOUNDED_KAPPA, kappa_for_win_rate, optimal_win_rate
from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval

ALWAYS, AS_NOISY, NEVER, OFF = "always", "if_as_noisy", "none", "off"
"""Whether a kappa has an optimum with pairs drawn from the model: whatever the labels; if they are turned as said; on
no guarantee; no term. As everywhere here, the model is to predict its own samples best."""
MOST_ROUNDS = 3
"""Rounds that are told of: each one needs the one before it to have come to its optimum."""
_HALVINGS = 100  # as exact as a float is


# ------------------------------------------------------------------------------------------------------ closed forms


def check_label_noise(share: float, *, name: str = "label_noise") -> None:
    """Raise ConfigurationError, which calls the setting `name`, unless 0 <= share < 1/2."""
    if not 0 <= share < 0.5:
        raise ConfigurationError(
            f"{name}={share} is the share of labels that are turned, at least 0 and below 0.5, from which on labels "
            "say nothing, or the opposite. A percentage is divided by 100."
        )


def acting_kappa(kappa: float, noise: float = 0.0) -> float:
    """The kappa whose optimum on clean labels is that of `kappa` on labels of which the share `noise` is turned."""
    check_label_noise(noise)
    return kappa / (1 - 2 * noise)


def guarantee(kappa: float, noise: float = 0.0) -> str:
    """Whether there is an optimum: one of `ALWAYS`, `AS_NOISY`, `NEVER` and `OFF`."""
    if kappa == 0:
        return OFF
    if kappa >= BOUNDED_KAPPA:
        return ALWAYS
    return AS_NOISY if acting_kappa(kappa, noise) >= BOUNDED_KAPPA else NEVER


def win_rate(kappa: float, noise: float = 0.0, *, rounds: int = 1) -> float:
    """Win rate of the optimum against the base model, by the true order.

    Args:
        kappa: with an optimum, so at least `0.5 - noise`.
        noise: share of labels that are turned, in [0, 0.5).
        rounds: 1 to `MOST_ROUNDS`; from the second on the reference is the optimum of the round before.

    Raises:
        ConfigurationError: a setting out of range.
    """
    assert 1 <= rounds <= MOST_ROUNDS, rounds
    kappa = acting_kappa(kappa, noise)
    if rounds == 1:
        return optimal_win_rate(kappa)
    # A polynomial of degree 2^rounds, on which Gauss's rule of n points, right up to degree 2n - 1, is exact.
    points, weights = np.polynomial.legendre.leggauss(2 ** (rounds - 1) + 1)
    below = (points + 1) / 2
    for _ in range(rounds):
        below = below + (below**2 - below) / (2 * kappa)
    return 1 - float(weights @ below) / 2


def win_rate_by_such_judges(kappa: float, noise: float) -> float:
    """The same where judges err as often as the labels: `1/2 + (1 - 2 noise)^2 / (12 kappa)`."""
    return 0.5 + (1 - 2 * noise) * (win_rate(kappa, noise) - 0.5)


def kappa_for(wanted: float, noise: float = 0.0, *, rounds: int = 1) -> float | None:
    """The kappa that wins so often by the true order after so many rounds; None: none that has an optimum does.

    It may lie below 1/2 where labels are noisy: see [`guarantee`].

    Args:
        wanted: win rate against the base model, in (0.5, 1).

    Raises:
        ConfigurationError: a setting out of range.
    """
    check_label_noise(noise)
    one_round = kappa_for_win_rate(wanted)
    if rounds == 1:
        return None if one_round is None else one_round * (1 - 2 * noise)
    if win_rate(BOUNDED_KAPPA, rounds=rounds) < wanted:
        return None
    low, high = BOUNDED_KAPPA, 2 * BOUNDED_KAPPA
    while win_rate(high, rounds=rounds) > wanted:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if win_rate(middle, rounds=rounds) > wanted else (low, middle)
    return low * (1 - 2 * noise)


# ------------------------------------------------------------------------------------------------------- label noise


@dataclass(frozen=True)
class LabelNoise:
    """The share of labels that are turned, and how it is known.

    Attributes:
        share: with an interval clustered by prompt; of a share that was given, of no width.
        source: "assumed", "given", "labels", or "scores".
        name: of the scores.
        num_pairs: that it was estimated from; 0: from none.
    """

    share: Interval
    source: str
    name: str = ""
    num_pairs: int = 0


def known_noise(share: float, source: str) -> LabelNoise:
    """A share that is given or assumed, not estimated."""
    check_label_noise(share)
    return LabelNoise(Interval(share, share, share), source)


def noise_of_votes(labels: np.ndarray, prompts: Sequence[object]) -> LabelNoise | None:
    """How often a vote is against its pair's majority; None where labels only say which arm is preferred, or a tie.

    Args:
        labels: (pairs,) shares of votes for one arm, in [0, 1].
        prompts: (pairs,) hashable.
    """
    minority = np.minimum(labels, 1 - labels)
    if not ((minority > 0) & (minority < 0.5)).any():
        return None
    share = clustered_interval(by_cluster(minority.tolist(), prompts), bounds=(0.0, 0.5))
    return LabelNoise(share, "labels", num_pairs=len(labels))


def noise_by_scores(differences: Mapping[str, np.ndarray], prompts: Sequence[object]) -> list[LabelNoise]:
    """How often the labels contradict each score, the score that they contradict least first; a tie is one half.

    Args:
        differences: name to (pairs,), score of the chosen minus that of the rejected arm; NaN where one is missing.
        prompts: (pairs,) hashable.
    """
    found = []
    for name, values in differences.items():
        known = np.flatnonzero(~np.isnan(values))
        if not len(known):
            continue
        contradicted = ((1 - np.sign(values[known])) / 2).tolist()
        clusters = by_cluster(contradicted, [prompts[place] for place in known])
        found.append(LabelNoise(clustered_interval(clusters, bounds=(0.0, 1.0)), "scores", name, len(known)))
    return sorted(found, key=lambda noise: noise.share.estimate)


# -------------------------------------------------------------------------------------------------------- prediction


def surest_guarantee(kappa: float, noise: LabelNoise) -> str:
    """As [`guarantee`], of the least noise that is likely; labels that are no better than chance promise nothing."""
    share = noise.share
    return guarantee(kappa, share.low if share.estimate < 0.5 else 0.0)


def win_rate_interval(kappa: float, noise: LabelNoise) -> Interval | None:
    """The win rate of the optimum with the doubt that the noise leaves; None: there may be no optimum, or no gain.

    An end at which labels say nothing wins one half.
    """
    share = noise.share
    if share.estimate >= 0.5 or surest_guarantee(kappa, noise) in (NEVER, OFF):
        return None
    # The win rate by the true order is linear in the noise.
    gain = win_rate(kappa, share.estimate) - 0.5
    low, high = (0.5 + gain * max(1 - 2 * end, 0) / (1 - 2 * share.estimate) for end in (share.high, share.low))
    return Interval(0.5 + gain, low, high, share.level)


def kappa_interval(wanted: float, noise: LabelNoise) -> Interval | None:
    """The kappa for a wanted win rate with the doubt that the noise leaves; None: none that has an optimum does."""
    clean = kappa_for(wanted)
    share = noise.share
    if clean is None or share.estimate >= 0.5:
        return None
    values = (clean * max(1 - 2 * end, 0) for end in (share.estimate, share.high, share.low))
    return Interval(*values, share.level)
