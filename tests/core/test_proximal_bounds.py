# SPDX-License-Identifier: Apache-2.0
"""The proximal term: from which kappa on a loss is convex and bounded, and how far a policy can get, at any beta.

Pairs here are random numbers that nothing relates to the reference. Everything is float64, and nothing is trained:
what is looked at are values, gradients and Hessians of the library's own functions. The derivations are in
docs/source/proximal.md.
"""

import math

import pytest
import torch

from trl_sipo.core.objectives import diffusion_dpo_loss, proximal_penalty
from trl_sipo.core.parameterization import prediction_error

LN2 = math.log(2)


def pair_loss(p, r, target, *, beta, kappa):
    """The library's loss per pair, (batch,), of predictions (2, batch, dims): those of the chosen arms first."""
    errors, ref_errors, distances = (
        [prediction_error(*arms) for arms in zip(*one, strict=True)] for one in ((p, target), (r, target), (p, r))
    )
    ratios = [(ref_error - error) / 2 for ref_error, error in zip(ref_errors, errors, strict=True)]
    return diffusion_dpo_loss(*ratios, beta=beta) + proximal_penalty(*distances, beta=beta, kappa=kappa)


def random_pairs(seed, batch=1, dims=3):
    """Policy, reference and target, (2, batch, dims) each, of pairs that nothing relates to the reference."""
    return torch.randn(3, 2, batch, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(p, r, target, **options):
    n = p.numel()
    found = torch.autograd.functional.hessian(lambda q: pair_loss(q, r, target, **options).sum(), p)
    return found.reshape(n, n)


@pytest.mark.parametrize("kappa", [0.5, 0.6, 2.0])
def test_from_one_half_on_the_limit_is_convex_for_any_pair(kappa):
    """The curvature is beta / dims times kappa + 1/2 on the chosen and kappa - 1/2 on the rejected arm."""
    expected = [(kappa - 0.5) / 3] * 3 + [(kappa + 0.5) / 3] * 3
    for seed in range(20):
        values = torch.linalg.eigvalsh(hessian(*random_pairs(seed), beta=1e-7, kappa=kappa) / 1e-7)
        assert values.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("beta", [1.0, 50.0])
@pytest.mark.parametrize("kappa", [0.5, 0.8, 1.0, 1.5])
def test_at_any_beta_a_pair_is_convex_where_its_push_is_at_most_kappa(kappa, beta):
    """The push is sigmoid(-z): below 1/2 where the chosen one leads, never above 1. So from kappa = 1 on, always.

    Of the three directions of the rejected arm at least two feel nothing of the curvature in the logit.
    """
    is_convex = set()
    for seed in range(30):
        p, r, target = random_pairs(seed)
        gains = [prediction_error(r[arm], target[arm]) - prediction_error(p[arm], target[arm]) for arm in (0, 1)]
        push = torch.sigmoid(-beta * (gains[0] - gains[1]) / 2).item()
        smallest = torch.linalg.eigvalsh(hessian(p, r, target, beta=beta, kappa=kappa)).min().item()
        if push > kappa:
            assert smallest == pytest.approx((kappa - push) * beta / 3, abs=1e-9)
        else:
            assert smallest > -1e-12
        is_convex.add(push <= kappa)
    assert is_convex == ({True} if kappa >= 1 else {True, False})


@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.45])
def test_below_one_half_the_limit_falls_without_an_end(kappa):
    """Where a rejected arm goes away from its target, the loss over beta falls with the square of the distance."""
    _, r, target = random_pairs(3)
    beta, values = 1e-14, []
    for distance in (1e2, 1e3, 1e4):
        p = torch.stack([r[0], r[1] + distance * (r[1] - target[1])])
        values.append(((pair_loss(p, r, target, beta=beta, kappa=kappa) - LN2) / beta).item() / distance**2)
    leading = (kappa - 0.5) / 2 * prediction_error(r[1], target[1]).item()
    assert values == pytest.approx([leading] * 3, rel=0.2) and values[2] == pytest.approx(leading, rel=0.03)


@pytest.mark.parametrize("kappa", [0.05, 0.2, 0.45])
@pytest.mark.parametrize("beta", [2.0, 200.0])
def test_below_one_half_a_beta_alone_ends_it_and_ever_farther_out(kappa, beta):
    """A rejected arm whose target is the reference's own prediction comes to rest where sigmoid(-z) = kappa.

    So at a distance of 2 / beta * ln(1 / kappa - 1): it grows without bound as beta shrinks. From 1/2 on such an arm,
    about which the reference is right, stays.
    """
    _, r, target = random_pairs(4)
    target[1] = r[1]
    distance = 2 / beta * math.log(1 / kappa - 1)
    away = torch.randn(r[1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    away *= (distance / away.square().mean()).sqrt()

    def gradient_at_scale(scale, kappa):
        p = torch.stack([r[0], r[1] + scale * away]).requires_grad_()
        return torch.autograd.grad(pair_loss(p, r, target, beta=beta, kappa=kappa).sum(), p)[0][1] / beta

    assert gradient_at_scale(1.0, kappa).abs().max() < 1e-12
    assert (
        (gradient_at_scale(0.5, kappa) * away).sum()
        < -1e-6 / beta
        < 1e-6 / beta
        < (gradient_at_scale(2.0, kappa) * away).sum()
    )
    assert (gradient_at_scale(1e-3, 0.5) * away).sum() > 0
    assert gradient_at_scale(0.0, 0.5).abs().max() == 0


def test_pairs_of_another_model_need_more_than_one_half():
    """A rejected sample that no chosen one is like ends at (r - target) / (2 kappa - 1) from the reference."""
    _, r, target = random_pairs(5)
    for kappa in (0.6, 1.0, 2.0):
        p = torch.stack([r[0], r[1] + (r[1] - target[1]) / (2 * kappa - 1)]).requires_grad_()
        loss = pair_loss(p, r, target, beta=1e-11, kappa=kappa)
        assert (torch.autograd.grad(loss.sum(), p)[0][1] / 1e-11).abs().max() < 1e-9
    p = r.clone()
    for distance in (1.0, 1e2, 1e4):  # at one half there is no curvature, and the force stays what it was
        p[1] = r[1] + distance * (r[1] - target[1])
        q = p.clone().requires_grad_()
        (force,) = torch.autograd.grad(pair_loss(q, r, target, beta=1e-16, kappa=0.5).sum(), q)
        torch.testing.assert_close(force[1] / 1e-16, -(r[1] - target[1]) / 6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_exact", [True, False])
def test_at_one_half_the_pairs_and_the_reference_decide(is_exact):
    """Four pairs whose rejected arms are noised to one x_t, to which no chosen arm is: P(win | x_t) = 0 there.

    A reference that is right about them, as it is where it drew them, leaves the limit flat: it is bounded. One that
    is off, or whose samples these are not, leaves a force that is the same at any distance, and no bound.
    """
    _, r, target = random_pairs(8, batch=4)
    off = torch.full_like(r[1], 0.0 if is_exact else 0.1)
    r[1], beta = target[1].mean(0) + off, 1e-13
    for distance in (0.0, 1.0, 100.0):
        shared = (r[1, 0] + distance).requires_grad_()
        loss = pair_loss(torch.stack([r[0], shared.expand(4, -1)]), r, target, beta=beta, kappa=0.5).mean()
        (force,) = torch.autograd.grad(loss / beta, shared)
        torch.testing.assert_close(force, -off[0] / 6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("error", [0.3, 2.0])
def test_at_one_half_a_beta_alone_ends_what_another_model_drew(error):
    """At d = (4 e / beta)^(2/3) for a small beta, e being the reference's error: without a bound as beta shrinks.

    Slower than below 1/2, where d goes with 1 / beta. Above 1/2 it is e^2 / (2 kappa - 1)^2.
    """

    def force(u, beta, kappa):
        p = tensor_pair(u).requires_grad_()
        loss = pair_loss(p, tensor_pair(0.0), tensor_pair(-error), beta=beta, kappa=kappa)
        return torch.autograd.grad(loss.sum(), p)[0][1].item()

    def tensor_pair(value):
        return torch.tensor([[[0.0]], [[value]]], dtype=torch.float64)

    def rest(beta, kappa):
        """Where the force is 0, by halving: before it the push is the stronger one, behind it the spring."""
        low, high = 0.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if force(middle, beta, kappa) < 0 else (low, middle)
        return low

    for beta in (1e-5, 1e-8):
        expected = (4 * error / beta) ** (2 / 3)
        assert rest(beta, 0.5) ** 2 == pytest.approx(expected, rel=0.1 if beta == 1e-5 else 0.01)
        assert rest(beta, 0.8) == pytest.approx(error / 0.6, rel=1e-3)


# ------------------------------------------------------------------------------ how far a policy gets, at any beta


@pytest.mark.parametrize("kappa", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("beta", [1e-4, 1e-2, 1.0, 1e2])
def test_no_policy_with_a_loss_below_its_start_is_farther_than_kappa_allows(kappa, beta):
    """mean(d_chosen + d_rejected) <= 4 mean(ref errors) / (2 kappa - 1)^2, and <= 2 ln 2 / (beta kappa).

    Since softplus lies above its tangent, the loss lies above that of the limit. Any pairs, any model: policies are
    random ones, scaled until their loss is that of the start, and the lowest of all along that way.
    """
    _, r, target = random_pairs(6, batch=16)
    ref_errors = sum(prediction_error(r[arm], target[arm]).mean() for arm in (0, 1)).item()
    bound = min(4 * ref_errors / (2 * kappa - 1) ** 2, 2 * LN2 / (beta * kappa))

    def mean_loss(p):
        return pair_loss(p, r, target, beta=beta, kappa=kappa).mean().item()

    towards = torch.stack([target[0] - r[0], r[1] - target[1]])
    farthest = 0.0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        shares, noise = torch.rand(2, 16, 1, generator=generator), torch.randn(r.shape, generator=generator)
        direction = shares * towards + seed / 200 * noise
        for scale in torch.logspace(-3, 3, 60).tolist():
            p = r + scale * direction
            distance = sum(prediction_error(p[arm], r[arm]).mean() for arm in (0, 1)).item()
            if mean_loss(p) <= LN2:
                assert distance <= bound
                farthest = max(farthest, distance)
    assert farthest > 0.01 * bound


def test_the_bound_is_reached():
    """Where the reference is right about the chosen arms: at twice the optimum the loss is that of the start."""
    _, r, target = random_pairs(7, batch=4)
    target[0], kappa, beta = r[0], 0.8, 1e-9
    p = torch.stack([r[0], r[1] + 2 * (r[1] - target[1]) / (2 * kappa - 1)])
    assert (pair_loss(p, r, target, beta=beta, kappa=kappa).mean() - LN2).item() / beta == pytest.approx(0, abs=1e-5)
    distance, ref_error = prediction_error(p[1], r[1]).mean(), prediction_error(r[1], target[1]).mean()
    assert distance.item() == pytest.approx(4 * ref_error.item() / (2 * kappa - 1) ** 2)
