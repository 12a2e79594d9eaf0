# SPDX-License-Identifier: Apache-2.0
"""MaPO: values in plain Python, the score at its ends, gradients."""

import math

import pytest
import torch

from tests.oracles.preference_losses import sigmoid
from trl_sipo.core.objectives.mapo import mapo_loss, mapo_score
from trl_sipo.errors import ConfigurationError

ERRORS = (1e-6, 1e-3, 0.01, 0.0199, 0.0201, 0.1, 0.5, 1.0, 20.0, 300.0)


def _score(error, snr_value):
    x = snr_value * error
    return x / math.expm1(x)


@pytest.mark.parametrize("snr_value", [0.5, 2.0])
def test_the_score_is_x_over_exp_x_minus_1(snr_value):
    score = mapo_score(torch.tensor(ERRORS, dtype=torch.float64), snr_value)
    assert score.tolist() == pytest.approx([_score(error, snr_value) for error in ERRORS], rel=1e-9)
    assert (score.diff() < 0).all()


def test_the_score_is_bounded_and_smooth_at_both_ends():
    errors = torch.tensor([0.0, 1e-30, 1e30], requires_grad=True)
    score = mapo_score(errors, 0.5)
    (gradient,) = torch.autograd.grad(score.sum(), errors)
    assert score.tolist() == [1.0, 1.0, 0.0]
    assert gradient.tolist() == pytest.approx([-0.25, -0.25, 0.0])  # the slope of x / (e^x - 1) at 0 is -1/2


@pytest.mark.parametrize(("chosen", "rejected"), [(0.1, 0.12), (0.12, 0.1), (0.2, 0.2)])
def test_the_loss_by_hand(chosen, rejected):
    arms = [torch.tensor([error], dtype=torch.float64) for error in (chosen, rejected)]
    margin = 1000 * (_score(chosen, 0.5) - _score(rejected, 0.5))
    assert mapo_loss(*arms).item() == pytest.approx(chosen - 0.1 * math.log(sigmoid(margin)))


def test_both_arms_are_pulled_the_right_way():
    arms = [torch.tensor([0.2], requires_grad=True), torch.tensor([0.2], requires_grad=True)]
    chosen, rejected = torch.autograd.grad(mapo_loss(*arms).sum(), arms)
    # Half of beta * T times the slope of the score, which is that of the margin at 0; and 1 of the denoising loss.
    slope = 0.5 * (_score(0.2 + 1e-6, 0.5) - _score(0.2 - 1e-6, 0.5)) / 2e-6
    assert rejected.item() == pytest.approx(0.1 * 1000 * slope, rel=1e-3)
    assert chosen.item() == pytest.approx(1 - 0.1 * 1000 * slope, rel=1e-3) and rejected.item() < 0 < chosen.item()


def test_gradcheck():
    arms = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([0.1, 1.0], [0.12, 0.9])]
    assert torch.autograd.gradcheck(lambda chosen, rejected: mapo_loss(chosen, rejected, num_timesteps=10), arms)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["beta", "snr_value"])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        mapo_loss(torch.zeros(1), torch.zeros(1), **{name: value})
