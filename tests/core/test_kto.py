# SPDX-License-Identifier: Apache-2.0
"""Diffusion-KTO: values by hand, gradients, and what the reference point does and does not."""

import math

import pytest
import torch

from tests.oracles.preference_losses import sigmoid
from trl_sipo.core.objectives.kto import kto_logit, kto_loss, reference_point
from trl_sipo.errors import ConfigurationError

RATIOS = torch.tensor([3e-4, -2e-4, 5e-4, 6e-4], dtype=torch.float64)
LIKED = torch.tensor([True, True, False, False])


def test_values_by_hand():
    """The mean of the log-ratios is 3e-4, so that the utilities are those of 0, -1, -0.4 and -0.6 at beta 2000."""
    point = reference_point(RATIOS)
    assert point.item() == pytest.approx(3e-4)
    logit = kto_logit(RATIOS, LIKED, point, beta=2000.0)
    assert logit.tolist() == pytest.approx([0.0, -1.0, -0.4, -0.6])
    loss = kto_loss(logit, LIKED, desirable_weight=2.0, undesirable_weight=0.5)
    expected = [2 * (1 - sigmoid(0.0)), 2 * (1 - sigmoid(-1.0)), 0.5 * (1 - sigmoid(-0.4)), 0.5 * (1 - sigmoid(-0.6))]
    assert loss.tolist() == pytest.approx(expected)


def test_settings_keep_the_precision_of_the_log_ratios():
    """A beta and weights that float32 would round."""
    point = reference_point(RATIOS)
    logit = kto_logit(RATIOS, LIKED, point, beta=0.37)
    assert logit.tolist() == pytest.approx([0.0, -0.37 * 5e-4, -0.37 * 2e-4, -0.37 * 3e-4], rel=1e-12)
    loss = kto_loss(logit, LIKED, desirable_weight=1.3, undesirable_weight=0.7)
    expected = [weight * sigmoid(-z) for weight, z in zip([1.3, 1.3, 0.7, 0.7], logit.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_fresh_model_has_a_loss_of_one_half():
    zero = torch.zeros(4)
    assert kto_loss(kto_logit(zero, LIKED, reference_point(zero), beta=5000.0), LIKED).tolist() == [0.5] * 4


def test_the_reference_point_is_never_negative_and_carries_no_gradient():
    ratios = (-RATIOS).clone().requires_grad_()
    point = reference_point(ratios)
    assert point.item() == 0.0 and not point.requires_grad
    assert not reference_point(RATIOS.clone().requires_grad_()).requires_grad
    assert reference_point(RATIOS.bfloat16()).dtype == torch.float32


def test_gradients_are_those_of_the_utility():
    """d loss / d logratio = -+ weight * beta * u (1 - u): liked images up, others down, less where it is decided."""
    ratios = RATIOS.clone().requires_grad_()
    logit = kto_logit(ratios, LIKED, reference_point(ratios), beta=2000.0)
    (gradient,) = torch.autograd.grad(kto_loss(logit, LIKED, undesirable_weight=3.0).sum(), ratios)
    utility = [sigmoid(z) for z in logit.tolist()]
    signs_and_weights = [-1.0, -1.0, 3.0, 3.0]
    expected = [k * 2000 * u * (1 - u) for k, u in zip(signs_and_weights, utility, strict=True)]
    assert gradient.tolist() == pytest.approx(expected)


def test_a_huge_logit_has_no_nan():
    logit = torch.tensor([1e30, -1e30], requires_grad=True)
    loss = kto_loss(logit, LIKED[:2])
    (gradient,) = torch.autograd.grad(loss.sum(), logit)
    assert loss.tolist() == [0.0, 1.0] and gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_weights_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        kto_loss(RATIOS, LIKED, **{name: value})
