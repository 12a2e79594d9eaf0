# SPDX-License-Identifier: Apache-2.0
"""IPO, hinge and robust losses: TRL's formulas in plain Python, gradients, and what each is for."""

import math
from functools import partial

import pytest
import torch

from tests.oracles.preference_losses import sigmoid
from trl_sipo.core.objectives import hinge_loss, ipo_loss, robust_loss
from trl_sipo.core.objectives._preference_nll import preference_nll
from trl_sipo.errors import ConfigurationError

LOGITS = (-80.0, -3.0, -0.1, 0.0, 0.2, 0.5, 0.99, 1.0, 5.0, 90.0)
LOSSES = {"hinge": hinge_loss, "ipo": ipo_loss, "robust": partial(robust_loss, label_smoothing=0.2)}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def _trl(name, delta, beta, smoothing=0.2):
    """`per_sequence_loss` of TRL 1.16's `DPOTrainer`, for one difference of log-ratios."""
    if name == "hinge":
        return max(0.0, 1 - beta * delta)
    if name == "ipo":
        return (delta - 1 / (2 * beta)) ** 2
    clean = -(1 - smoothing) * math.log(sigmoid(beta * delta))
    flipped = -smoothing * math.log(sigmoid(-beta * delta))
    return (clean - flipped) / (1 - 2 * smoothing)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("z", LOGITS)
@pytest.mark.parametrize("beta", [0.1, 5000.0])
def test_values_are_those_of_trl(name, z, beta):
    """IPO's are beta^2 times TRL's."""
    loss = LOSSES[name](torch.tensor([z], dtype=torch.float64)).item()
    factor = beta**2 if name == "ipo" else 1.0
    assert loss == pytest.approx(factor * _trl(name, z / beta, beta), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("z", LOGITS)
def test_gradients(z):
    """Of hinge -1 below 1; of IPO 2 z - 1; of robust DPO -((1 - e) sigmoid(-z) + e sigmoid(z)) / (1 - 2 e)."""
    expected = {
        "hinge": -1.0 if z < 1 else 0.0,
        "ipo": 2 * z - 1,
        "robust": -(0.8 * sigmoid(-z) + 0.2 * sigmoid(z)) / 0.6,
    }
    for name, loss in LOSSES.items():
        logit = torch.tensor([z], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(logit).sum(), logit)
        assert gradient.item() == pytest.approx(expected[name], rel=1e-12, abs=1e-15), name


def test_the_robust_loss_is_unbiased_under_flipped_labels():
    """With a share e of labels flipped, its mean is the loss of the true label."""
    logit = torch.tensor(LOGITS, dtype=torch.float64)
    observed = 0.8 * robust_loss(logit, label_smoothing=0.2) + 0.2 * robust_loss(-logit, label_smoothing=0.2)
    torch.testing.assert_close(observed, preference_nll(logit))
    assert torch.equal(robust_loss(logit, label_smoothing=0.0), preference_nll(logit))


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0, math.nan])
def test_a_share_of_flipped_labels_out_of_range_is_refused(share):
    with pytest.raises(ConfigurationError, match=f"label_smoothing={share}"):
        robust_loss(torch.zeros(1), label_smoothing=share)


@each_loss
def test_half_precision_is_widened_first(loss):
    logit = torch.tensor(LOGITS).bfloat16()
    assert loss(logit).dtype == torch.float32 and torch.equal(loss(logit), loss(logit.float()))
