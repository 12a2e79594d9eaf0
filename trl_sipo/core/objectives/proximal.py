# SPDX-License-Identifier: Apache-2.0
"""The proximal term: a pull to the reference that gives Diffusion-DPO an optimum, and where that optimum lies.

Per pair, with `d = mean((policy prediction - reference prediction)^2)` of each arm, an objective gains

    (beta * kappa / 2) * (d_chosen + d_rejected)

As `rho^2 d / 2` is the divergence KL(p_theta || p_ref) of a denoising step per latent dimension, this is a KL term
whose weight is tied to beta. With the loss of Diffusion-DPO, as beta goes to 0, with both arms of a pair drawn from
the reference, independently, and a reference that predicts its own samples best, the optimum is what predicts one
distribution at all levels, in every parameterisation:

    p*(x_0) = p_ref(x_0) * (1 + (P(win | x_0) - 1/2) / kappa)

P(win | x_0) is the chance of x_0 against another sample of the reference. p* is where `E_p[P(win)] - (kappa / 2)
chi^2(p || p_ref)` is largest. The limit is a quadratic form with the factor `kappa - 1/2 + P(win | x_t)` at each
x_t, P being the share of chosen arms among those that are noised to x_t. So the threshold is kappa = 1/2:

- Above 1/2 it is convex and has a minimum, whatever the pairs. And at any beta a policy whose mean loss is not above
  that of its start, with any pairs and any network, has
  `mean(d_chosen + d_rejected) <= 4 mean(ref_error_chosen + ref_error_rejected) / (2 kappa - 1)^2`.
- At exactly 1/2 it is convex whatever the pairs, and sure to have a minimum only on the assumptions above: pairs drawn
  from the reference, which predicts its own samples best. Elsewhere an x_t to which only rejected arms come is pushed
  with a constant force against no curvature, the farther the smaller beta is.
- Below 1/2 samples that rarely win are pushed away until sigmoid(-z) = kappa, which is the farther out the smaller
  beta is; in Diffusion-DPO, which is kappa = 0, without an end.

The 1/2 is the slope of the log-sigmoid at 0: a loss that starts with another slope has that one for its threshold. The
derivation is in docs/source/proximal.md.
"""

import torch
from torch import Tensor

from trl_sipo.core.beta import check_beta
from trl_sipo.core.precision import widen
from trl_sipo.errors import ConfigurationError

BOUNDED_KAPPA = 0.5
"""The threshold: with a larger kappa Diffusion-DPO has an optimum as beta goes to 0, whatever the pairs.

With this one it has one where they are drawn from a reference that predicts its own samples best."""
CONTINUOUS_VARIANCE = 1 / 12
"""Variance of P(win | x) over the reference where a reward without ties and without noise ranks: P is uniform."""


def check_kappa(kappa: float, *, name: str = "proximal_kappa") -> None:
    """Raise ConfigurationError, which calls the setting `name`, unless 0 <= kappa < inf."""
    if not 0 <= kappa < float("inf"):
        raise ConfigurationError(
            f"{name}={kappa} must be zero or positive, and finite: 0 switches the proximal term off, and with "
            f"{BOUNDED_KAPPA} or more Diffusion-DPO has an optimum for pairs of two samples of the reference."
        )


def proximal_penalty(*distances: Tensor, beta: float, kappa: float | Tensor) -> Tensor:
    """`(beta * kappa / 2) * (d_chosen + d_rejected)`.

    Args:
        distances: `(batch,)` each, of the arms that there are: squared distance of the policy's prediction from the
            reference's, averaged over dims; any floating dtype.
        beta: positive, Diffusion-DPO convention; that of the objective which the term is added to.
        kappa: zero or positive; one for all, or `(batch,)`.

    Returns:
        The unreduced term `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: a setting out of range.
    """
    check_beta(beta)
    if not isinstance(kappa, Tensor):
        check_kappa(kappa)
    assert distances and all(one.ndim == 1 and one.shape == distances[0].shape for one in distances), "need (batch,)"
    return beta * kappa / 2 * torch.stack(widen(*distances)).sum(0)


def optimal_win_rate(kappa: float, preference_variance: float = CONTINUOUS_VARIANCE) -> float:
    """Win rate of the optimum against the reference, `1/2 + variance / kappa`, as beta goes to 0.

    Args:
        kappa: at least 1/2.
        preference_variance: variance of P(win | x), the chance of x against another sample of the reference, over
            samples of the reference; 1/12, the most that there can be, where labels are those of a fixed ranking
            without noise.

    Raises:
        ConfigurationError: kappa below 1/2, where there may be no optimum, or a variance that is none.
    """
    check_kappa(kappa)
    check_preference_variance(preference_variance)
    if kappa < BOUNDED_KAPPA:
        raise ConfigurationError(
            f"kappa={kappa} is below {BOUNDED_KAPPA}, where the objective need not have an optimum, and no win rate "
            f"is known beforehand. Give {BOUNDED_KAPPA} or more."
        )
    return 0.5 + preference_variance / kappa


def kappa_for_win_rate(win_rate: float, preference_variance: float = CONTINUOUS_VARIANCE) -> float | None:
    """The kappa whose optimum wins so often against the reference; None: none of at least 1/2 does.

    Args:
        win_rate: above 1/2, below 1.
        preference_variance: as of `optimal_win_rate`.

    Raises:
        ConfigurationError: a win rate or a variance out of range.
    """
    check_preference_variance(preference_variance)
    if not 0.5 < win_rate < 1:
        raise ConfigurationError(
            f"win_rate={win_rate} must lie between 0.5, which the reference has against itself, and 1, both excluded."
        )
    kappa = preference_variance / (win_rate - 0.5)
    return kappa if kappa >= BOUNDED_KAPPA else None


def check_preference_variance(preference_variance: float) -> None:
    """Raise ConfigurationError unless it can be the variance of a chance of winning: 0 < variance <= 1/12."""
    if not 0 < preference_variance <= CONTINUOUS_VARIANCE:
        raise ConfigurationError(
            f"preference_variance={preference_variance} must lie in (0, 1/12]: chances of winning against the same "
            "distribution are 1/2 on average, and at most evenly spread."
        )
