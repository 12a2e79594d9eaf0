# SPDX-License-Identifier: Apache-2.0
"""Labels as probabilities: closed forms, the limits in which they are what was there before, and extreme logits."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import preference_losses
from trl_sipo.core.objectives import soft_label_loss
from trl_sipo.core.objectives._preference_nll import preference_nll
from trl_sipo.core.objectives.dpo_cm import masked_weighted_nll
from trl_sipo.core.objectives.sipo import masked_scaled_nll

KEEP = torch.tensor([True, False, True, True])
WEIGHT = torch.tensor([0.9, 1.0, 1.05, 1.1])
OBJECTIVES = {
    "dpo": preference_nll,
    "smoothed": partial(preference_nll, label_smoothing=0.1),
    "poly_dpo": partial(preference_nll, alpha=8.0),
    "dpo_cm": lambda logit: masked_weighted_nll(logit, KEEP, WEIGHT),
    "sipo": lambda logit: masked_scaled_nll(logit, KEEP, WEIGHT, alpha=2.0, label_smoothing=0.05),
}
every_objective = pytest.mark.parametrize("loss", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def _scalar(value):
    return torch.tensor([value], dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.floats(-20, 20), st.floats(0, 1), st.floats(0, 0.49))
def test_the_cross_entropy_of_a_label_by_hand(z, label, smoothing):
    """-p log sigmoid(z) - (1 - p) log sigmoid(-z), where smoothing by e makes p (1 - 2 e) + e of the label."""
    p = label * (1 - 2 * smoothing) + smoothing
    expected = p * preference_losses.preference_nll(z) + (1 - p) * preference_losses.preference_nll(-z)
    loss = partial(preference_nll, label_smoothing=smoothing)
    assert soft_label_loss(loss, _scalar(z), _scalar(label)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("label", [0.03, 0.5, 0.7, 0.999])
def test_the_gradient_vanishes_where_the_model_agrees(label):
    logit = _scalar(math.log(label / (1 - label))).requires_grad_()
    soft_label_loss(preference_nll, logit, _scalar(label)).sum().backward()
    assert logit.grad.item() == pytest.approx(0, abs=1e-15)
    beyond = (logit.detach() + 1).requires_grad_()
    soft_label_loss(preference_nll, beyond, _scalar(label)).sum().backward()
    assert beyond.grad.item() > 1e-4


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_certain_label_changes_no_bit(loss, dtype):
    logit = torch.tensor([-3.0, 0.4, 0.0, 50.0], dtype=dtype, requires_grad=True)
    for label, plain in ((1.0, loss(logit)), (0.0, loss(-logit))):
        soft = soft_label_loss(loss, logit, torch.full((4,), label))
        assert torch.equal(soft, plain) and soft.dtype == plain.dtype
        gradients = [torch.autograd.grad(value.sum(), logit)[0] for value in (soft, plain)]
        assert torch.equal(*gradients)


@every_objective
def test_exchanged_arms_with_the_opposite_label_are_the_same_pair(loss):
    logit, label = torch.tensor([-3.0, 0.4, 0.0, 5.0]), torch.tensor([0.9, 0.25, 1.0, 0.5])
    torch.testing.assert_close(soft_label_loss(loss, logit, label), soft_label_loss(loss, -logit, 1 - label))


@every_objective
def test_a_tie_pulls_towards_indifference(loss):
    logit = torch.tensor([-2.0, 0.0, 0.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(soft_label_loss(loss, logit, torch.full((4,), 0.5)).sum(), logit)
    assert gradient.sign().tolist() == [-1, 0, 0, 1]


def test_a_side_without_weight_cannot_spoil_an_infinite_logit():
    logit = torch.tensor([float("inf"), float("-inf")], requires_grad=True)
    loss = soft_label_loss(preference_nll, logit, torch.tensor([1.0, 0.0]))
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and logit.grad.tolist() == [0, 0]


def test_labels_may_be_of_another_precision():
    loss = soft_label_loss(preference_nll, torch.zeros(1, dtype=torch.float64), torch.tensor([0.25]))
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(math.log(2))
