# SPDX-License-Identifier: Apache-2.0
"""The proximal term: where its optimum lies, and what the optimum is.

References have finitely many clean values ([`Atoms`]), or are a mixture of Gaussians with explicit posteriors, beside
which dense quadrature is a second way to the same numbers. Everything is float64, and nothing is trained: what is
looked at are gradients of the library's own functions. The derivations are in docs/source/proximal.md.
"""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.special import ndtr

from tests.oracles.sd15_profile import alphas_cumprod
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.core.objectives import (
    hinge_loss,
    ipo_loss,
    kappa_for_win_rate,
    kto_loss,
    optimal_win_rate,
    proximal_penalty,
    robust_loss,
)
from trl_sipo.core.objectives._preference_nll import preference_logit, preference_nll
from trl_sipo.core.objectives.proximal import BOUNDED_KAPPA, CONTINUOUS_VARIANCE
from trl_sipo.core.parameterization import predicted_clean, prediction_error, prediction_target
from trl_sipo.errors import ConfigurationError

VP = VPSchedule(alphas_cumprod(), dtype=torch.float64)
FLOW = FlowSchedule(dtype=torch.float64)
# Kind of output, and a clean, a middle and a noisy level of its schedule.
LEVELS = [
    *(
        (kind, VP.level(torch.tensor([timestep])))
        for kind in ("epsilon", "v_prediction")
        for timestep in (60, 300, 800)
    ),
    *(("flow_prediction", FLOW.level(torch.tensor([sigma]).double())) for sigma in (0.2, 0.5, 0.9)),
]
LEVEL_IDS = [f"{kind}-{level.sigma_t.item():.2f}" for kind, level in LEVELS]
at_each_level = pytest.mark.parametrize(("kind", "level"), LEVELS, ids=LEVEL_IDS)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ references


@dataclass(frozen=True)
class Atoms:
    """Clean values (n,) with their probabilities (n,): a reference, or a distribution made of one."""

    values: torch.Tensor
    probabilities: torch.Tensor

    def mean(self, of, x_t, level):
        """E[of | x_t] for each of x_t (batch,), `of` being (n,) or (batch, n)."""
        spread = (x_t[:, None] - level.alpha_t * self.values) / level.sigma_t
        posterior = torch.softmax(self.probabilities.log() - spread**2 / 2, dim=1)
        return (posterior * of).sum(1)

    def predictor(self, x_t, level, kind):
        """What a perfect network says at x_t (batch,): the mean of its target, (batch,)."""
        clean = self.values.expand(len(x_t), -1).contiguous()
        noise = (x_t[:, None] - level.alpha_t * clean) / level.sigma_t
        return self.mean(prediction_target(clean, noise, level.expand(len(x_t)), kind), x_t, level)

    def tilted(self, win_chance, kappa):
        """p*(x_0) = p(x_0) (1 + (P(win | x_0) - 1/2) / kappa)."""
        return Atoms(self.values, self.probabilities * (1 + (win_chance - 0.5) / kappa))


ATOMS = Atoms(tensor(-1.3, -0.4, 0.1, 0.9, 1.6), tensor(0.1, 0.3, 0.25, 0.2, 0.15))


def preferences(seed=0):
    """The chance that one atom is preferred to another, (n, n): any numbers, not even transitive ones."""
    upper = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    return upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(5, dtype=torch.float64)


# A mixture of Gaussians; `tau` is the noise of who compares: x beats y with probability ndtr((x - y) / tau).
WEIGHTS, MEANS, SPREADS = tensor(0.5, 0.3, 0.2), tensor(-1.0, 0.3, 1.2), tensor(0.3, 0.2, 0.4)


def win_chance(x, tau):
    """P(win | x) against another sample of the mixture, of x (n,); at tau = 0 its rank, evenly spread."""
    return (WEIGHTS * ndtr((x[:, None] - MEANS) / (SPREADS**2 + tau**2).sqrt())).sum(1)


def log_tilt(x_t, level, kappa, tau):
    """log(kappa - 1/2 + P(win | x_t)), (batch,): explicit, since each posterior is a mixture of Gaussians."""
    a, b = level.alpha_t, level.sigma_t
    marginal = (a * SPREADS) ** 2 + b**2
    parts = torch.softmax(WEIGHTS.log() - marginal.log() / 2 - (x_t[:, None] - a * MEANS) ** 2 / (2 * marginal), dim=1)
    centre = MEANS + a * SPREADS**2 / marginal * (x_t[:, None] - a * MEANS)
    variance = SPREADS**2 * b**2 / marginal
    arguments = (centre[:, :, None] - MEANS) / (SPREADS**2 + tau**2 + variance[:, None]).sqrt()
    chance = (parts[:, :, None] * WEIGHTS * ndtr(arguments)).sum((1, 2))
    return (kappa - 0.5 + chance).log()


def quadrature():
    """The mixture on a dense grid: sums over it are integrals to the last digits, the integrands being smooth."""
    x = torch.linspace(-5, 5, 5001, dtype=torch.float64)
    density = WEIGHTS * torch.exp(-((x[:, None] - MEANS) ** 2) / (2 * SPREADS**2)) / (SPREADS * math.sqrt(2 * math.pi))
    return Atoms(x, density.sum(1) * (x[1] - x[0]))


# ------------------------------------------------------------------------------------ the optimum, and what it samples


@at_each_level
@pytest.mark.parametrize("kappa", [0.5, 0.8, 3.0])
@pytest.mark.parametrize("tau", [0.0, 0.7])
def test_the_optimum_is_the_predictor_of_one_distribution(kind, level, kappa, tau):
    """Minimiser of the quadratic form, score formula and tilted distribution agree to 1e-10, at every level.

    Given x_t a pair is one of its winners with density 2 q(x_t) P(win | x_t), else one of its losers. With `w`, `l`
    the means of the target among these, the objective is, over beta and up to what does not depend on p,

        q(x_t) [ P (p - w)^2 / 2 - (1 - P) (p - l)^2 / 2 + kappa (p - r)^2 ]
    """
    reference = quadrature()
    chance_0 = win_chance(reference.values, tau)
    x_t = torch.linspace(-1.8, 1.8, 9, dtype=torch.float64).requires_grad_()
    chance = reference.mean(chance_0, x_t, level)
    (slope,) = torch.autograd.grad(log_tilt(x_t, level, kappa, tau).sum(), x_t)
    x_t, chance = x_t.detach(), chance.detach()
    torch.testing.assert_close((kappa - 0.5 + chance).log(), log_tilt(x_t, level, kappa, tau), rtol=1e-10, atol=1e-10)

    r, optimal = (p.predictor(x_t, level, kind) for p in (reference, reference.tilted(chance_0, kappa)))
    winners, losers = (
        Atoms(reference.values, 2 * reference.probabilities * part).predictor(x_t, level, kind)
        for part in (chance_0, 1 - chance_0)
    )
    minimiser = (chance * winners - (1 - chance) * losers + 2 * kappa * r) / (2 * (kappa - 0.5 + chance))
    torch.testing.assert_close(minimiser, optimal, rtol=1e-10, atol=1e-10)

    # In what the library makes of a prediction: x0_hat moves by sigma^2 / alpha times the gradient of the log.
    clean, clean_r = (predicted_clean(p[:, None], x_t[:, None], level.expand(9), kind)[:, 0] for p in (minimiser, r))
    torch.testing.assert_close(clean, clean_r + level.sigma_t**2 / level.alpha_t * slope, rtol=1e-10, atol=1e-10)
    factor = level.sigma_t if kind == "epsilon" else level.sigma_t / level.alpha_t
    torch.testing.assert_close(optimal, r - factor * slope, rtol=1e-10, atol=1e-10)
    if kappa == BOUNDED_KAPPA:
        torch.testing.assert_close(optimal, winners, rtol=1e-10, atol=1e-10)
    assert (optimal - r).abs().max() > 1e-3


# --------------------------------------------------------------------------- the library's functions have this optimum

# A loss on the logit, and how steeply it falls at 0.
LOSSES = {
    "sigmoid": (preference_nll, 0.5),
    "smoothed": (partial(preference_nll, label_smoothing=0.2), 0.5 * (1 - 2 * 0.2)),
    "robust": (partial(robust_loss, label_smoothing=0.2), 0.5 / (1 - 2 * 0.2)),
    "poly": (partial(preference_nll, alpha=8.0), (2 + 8) / 4),
    "ipo": (ipo_loss, 1.0),
    "hinge": (hinge_loss, 1.0),
}


def slope_of(loss):
    """-dL/dz at z = 0, by autograd."""
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    return -torch.autograd.grad(loss(logit).sum(), logit)[0].item()


def gradient_at(optimum, kind, level, *, beta, kappa, wins, loss=preference_nll, share_noise=True):
    """Of the mean loss of all pairs over beta, at the predictor of `optimum`, along eight bumps in x_t: (8,).

    Every pair of atoms (each drawn from the reference, labelled by `wins`) with every noise of a grid; two of them
    where the arms do not share theirs. The predictions are those of a network that adds bumps to the optimum.
    """
    eps = torch.linspace(-8, 8, 321 if share_noise else 81, dtype=torch.float64)
    noises = (eps, eps) if share_noise else torch.meshgrid(eps, eps, indexing="ij")
    noises = [one.flatten() for one in noises]
    density = torch.exp(-(noises[0] ** 2 if share_noise else noises[0] ** 2 + noises[1] ** 2) / 2)
    p = ATOMS.probabilities
    pairs = (2 * p[:, None] * p * wins).flatten()  # winner, loser
    weight = (pairs[:, None] * density / density.sum()).flatten()
    bumps = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    errors, ref_errors, distances = [], [], []
    for values, noise in zip((ATOMS.values.repeat_interleave(5), ATOMS.values.repeat(5)), noises, strict=True):
        clean, noise = values.repeat_interleave(len(noise))[:, None], noise.repeat(25)[:, None]
        levels = level.expand(len(clean))
        target, x_t = prediction_target(clean, noise, levels, kind), levels.add_noise(clean, noise)[:, 0]
        r, optimal = (one.predictor(x_t, level, kind)[:, None] for one in (ATOMS, optimum))
        centres = torch.linspace(-2, 2, 8, dtype=torch.float64)
        prediction = optimal + (torch.exp(-2 * (x_t[:, None] - centres) ** 2) * bumps).sum(1, keepdim=True)
        errors.append(prediction_error(prediction, target))
        ref_errors.append(prediction_error(r, target))
        distances.append(prediction_error(prediction, r))
    ratios = [(ref_error - error) / 2 for ref_error, error in zip(ref_errors, errors, strict=True)]
    losses = loss(preference_logit(*ratios, beta)) + proximal_penalty(*distances, beta=beta, kappa=kappa)
    return torch.autograd.grad((weight * losses).sum() / beta, bumps)[0]


@pytest.mark.parametrize(
    ("kind", "level", "share_noise"),
    [*((*case, True) for case in LEVELS), *((*case, False) for case in LEVELS[1::3])],
    ids=[*LEVEL_IDS, *(f"{name}-separate" for name in LEVEL_IDS[1::3])],
)
def test_the_gradient_of_the_loss_vanishes_at_the_optimum(kind, level, share_noise):
    """As beta goes to 0, for any preference; shared noise or not, since only the marginals of the arms count."""
    wins, kappa = preferences(), 0.7
    chance = wins @ ATOMS.probabilities
    assert (chance @ ATOMS.probabilities).item() == pytest.approx(0.5)
    at = partial(gradient_at, kind=kind, level=level, kappa=kappa, wins=wins, share_noise=share_noise)
    optimum = ATOMS.tilted(chance, kappa)
    assert at(optimum, beta=1e-11).abs().max() < 1e-10
    assert at(ATOMS, beta=1e-11).abs().max() > 1e-3
    assert at(ATOMS.tilted(chance, 2 * kappa), beta=1e-11).abs().max() > 1e-3


def test_the_optimum_is_reached_linearly_in_beta():
    kind, level = LEVELS[1]
    wins, kappa = preferences(), 0.7
    optimum = ATOMS.tilted(wins @ ATOMS.probabilities, kappa)
    sizes = [
        gradient_at(optimum, kind, level, beta=beta, kappa=kappa, wins=wins).norm().item()
        for beta in (1e-1, 1e-2, 1e-3)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(10, rel=0.02) and sizes[1] / sizes[2] == pytest.approx(10, rel=0.02)


def test_where_no_sample_always_loses_less_than_one_half_is_enough():
    """Pairs of the reference with labels of which 30 % are wrong: no chance is below 0.3, and kappa = 0.2 will do."""
    ranks = torch.arange(5)
    better = (ranks[:, None] > ranks).double() + 0.5 * torch.eye(5, dtype=torch.float64)
    wins = 0.7 * better + 0.3 * better.T
    chance = wins @ ATOMS.probabilities
    assert chance.min() > 0.3
    optimum = ATOMS.tilted(chance, 0.2)
    kind, level = LEVELS[1]
    assert optimum.probabilities.min() > 0
    assert gradient_at(optimum, kind, level, beta=1e-11, kappa=0.2, wins=wins).abs().max() < 1e-10


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses_have_the_same_optimum_with_kappa_over_twice_their_slope(name):
    """In the limit a loss is its slope at 0, so that the threshold of kappa is that slope: 1/2 for the log-sigmoid."""
    loss, slope = LOSSES[name]
    assert slope_of(loss) == pytest.approx(slope, rel=1e-12)
    kind, level = LEVELS[4]
    wins = preferences(1)
    optimum = ATOMS.tilted(wins @ ATOMS.probabilities, 0.8)
    at = partial(gradient_at, optimum, kind, level, beta=1e-11, wins=wins, loss=loss)
    assert at(kappa=0.8 * 2 * slope).abs().max() < 1e-9
    assert slope == 0.5 or at(kappa=0.8).abs().max() > 1e-3


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_threshold_of_kto_is_a_quarter_of_the_weight(weight):
    """No image is ever pushed away by more: the utility is steepest at 0."""
    for logit in (-2.0, 0.0, 1.0):
        z = tensor(logit).requires_grad_()
        loss = kto_loss(z, torch.tensor([False]), desirable_weight=1.0, undesirable_weight=weight)
        push = -torch.autograd.grad(loss.sum(), z)[0].item()
        assert push == pytest.approx(weight / 4) if logit == 0 else push < weight / 4


# --------------------------------------------------------------------------------------------- what the optimum is


@pytest.mark.parametrize("kappa", [0.5, 1.0, 4.0])
def test_the_optimum_solves_the_chi_squared_problem(kappa):
    """E_p[P(win)] - kappa / 2 chi^2(p || p_ref) is that of p*, less kappa / 2 times the squared distance from it."""
    chance = preferences(2) @ ATOMS.probabilities
    reference, optimum = ATOMS.probabilities, ATOMS.tilted(chance, kappa).probabilities
    assert optimum.sum().item() == pytest.approx(1) and optimum.min() >= 0

    def value(p):
        return ((p * chance).sum() - kappa / 2 * ((p**2 / reference).sum() - 1)).item()

    others = torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample((50,))
    for p in (reference, *others):
        gap = kappa / 2 * ((p - optimum) ** 2 / reference).sum().item()
        assert value(optimum) - value(p) == pytest.approx(gap, rel=1e-10, abs=1e-12)
        assert gap > 0


@pytest.mark.parametrize("kappa", [0.5, 0.9, 10.0])
@pytest.mark.parametrize("tau", [0.0, 0.7])
def test_the_win_rate_is_one_half_and_the_variance_over_kappa(kappa, tau):
    reference = quadrature()
    chance = win_chance(reference.values, tau)
    p = reference.probabilities
    variance = min(((chance - 0.5) ** 2 * p).sum().item(), CONTINUOUS_VARIANCE)  # ranks have all of it
    rate = (reference.tilted(chance, kappa).probabilities * chance).sum().item()
    assert rate == pytest.approx(optimal_win_rate(kappa, variance), abs=1e-10)
    assert kappa_for_win_rate(rate, variance) == pytest.approx(kappa, rel=1e-8) or kappa == BOUNDED_KAPPA
    if tau == 0:
        assert variance == pytest.approx(CONTINUOUS_VARIANCE, abs=1e-10)
        assert rate == pytest.approx(optimal_win_rate(kappa), abs=1e-10)
    else:
        assert variance < 0.9 * CONTINUOUS_VARIANCE


def test_chances_of_winning_are_never_more_spread_than_ranks():
    """The variance is at most 1/12, whatever is preferred to what (Landau 1953); ranks of many come close to it."""
    for seed in range(50):
        p = torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample()
        for wins in (preferences(seed), preferences(seed).round()):
            wins.fill_diagonal_(0.5)
            chance = wins @ p
            assert ((chance - 0.5) ** 2 @ p).item() <= CONTINUOUS_VARIANCE
    ranks = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert CONTINUOUS_VARIANCE - 1e-6 < ((ranks - 0.5) ** 2).mean().item() <= CONTINUOUS_VARIANCE


def test_kappa_and_win_rate_belong_to_each_other():
    assert optimal_win_rate(0.5) == pytest.approx(2 / 3) and optimal_win_rate(1.0) == pytest.approx(7 / 12)
    assert kappa_for_win_rate(0.6) == pytest.approx(10 / 12)
    assert kappa_for_win_rate(0.66) is not None and kappa_for_win_rate(0.67) is None  # 2/3 is the most there is
    assert kappa_for_win_rate(0.6, 0.01) is None


# ------------------------------------------------------------------------------------------------- the function itself


def test_values_by_hand():
    distances = tensor(0.1, 0.0), tensor(0.3, 2.0)
    assert proximal_penalty(*distances, beta=10.0, kappa=0.5).tolist() == pytest.approx([1.0, 5.0])
    assert proximal_penalty(distances[0], beta=10.0, kappa=0.5).tolist() == pytest.approx([0.25, 0.0])
    each = proximal_penalty(*distances, beta=10.0, kappa=tensor(0.5, 1.0))
    assert each.tolist() == pytest.approx([1.0, 10.0])
    assert proximal_penalty(*distances, beta=10.0, kappa=0.0).tolist() == [0.0, 0.0]
    assert proximal_penalty(torch.ones(2, dtype=torch.bfloat16), beta=1.0, kappa=0.5).dtype == torch.float32


@pytest.mark.parametrize("kappa", [-0.1, math.nan, math.inf])
def test_a_kappa_that_is_none_is_named(kappa):
    with pytest.raises(ConfigurationError, match=f"proximal_kappa={kappa} must be zero or positive, and finite"):
        proximal_penalty(tensor(0.1), beta=1.0, kappa=kappa)
    with pytest.raises(ConfigurationError, match="beta=0"):
        proximal_penalty(tensor(0.1), beta=0.0, kappa=0.5)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (optimal_win_rate, (0.4,), "kappa=0.4 is below 0.5"),
        (optimal_win_rate, (math.nan,), "nan must be zero or positive"),
        (optimal_win_rate, (1.0, 0.1), r"preference_variance=0.1 must lie in \(0, 1/12\]"),
        (kappa_for_win_rate, (0.5,), "win_rate=0.5 must lie between"),
        (kappa_for_win_rate, (1.0,), "win_rate=1.0 must lie between"),
        (kappa_for_win_rate, (0.6, 0.0), "preference_variance=0.0"),
    ],
)
def test_win_rates_that_cannot_be_are_named(function, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        function(*arguments)
