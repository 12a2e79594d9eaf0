# SPDX-License-Identifier: Apache-2.0
"""Weights, clipping and masks, and the published behaviour of Stable Diffusion 1.5 (w(t) and its cut at 0.9)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import sd15_profile
from trl_sipo.core.importance import (
    clip_log_weight,
    log_importance_weight,
    pair_log_weight,
    sequence_log_weight,
    timestep_mask,
)
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.core.transition import rho_squared
from trl_sipo.errors import ConfigurationError

log_weights = st.lists(st.floats(-40, 40), min_size=1, max_size=8)


def _sd15_log_weight(num_steps: int) -> torch.Tensor:
    """log w of SD1.5 at every timestep, from float32 levels as in training."""
    schedule = VPSchedule(sd15_profile.alphas_cumprod())
    level = schedule.level(torch.arange(1000))
    rho2 = rho_squared(level, schedule.previous_level(level, num_steps), "epsilon")
    return log_importance_weight(sd15_profile.epsilon_error(np.arange(1000)).float(), rho2)


def test_sd15_weight_rises_with_the_timestep_as_published():
    weight = _sd15_log_weight(50).exp()
    published = {40: 0.756, 63: 0.887, 100: 0.943, 300: 0.988, 500: 0.995, 900: 0.999}
    for timestep, value in published.items():
        # t = 40 lies between two knots of the profile, so its third digit depends on the interpolation.
        assert weight[timestep].item() == pytest.approx(value, abs=0.0015 if timestep == 40 else 0.0006)
    assert (weight[:20] == 0).all()
    assert (weight[20:500].diff() > 0).all()


@pytest.mark.parametrize(
    ("num_steps", "first", "last"), [(50, 66, 68), (1000, 3, 3), (100, 34, 37), (40, 81, 83)], ids=str
)
def test_sd15_weight_crosses_nine_tenths_at_one_timestep(num_steps, first, last):
    keep = timestep_mask(_sd15_log_weight(num_steps), 0.9)
    last_masked = (~keep).nonzero().max().item()
    assert first <= last_masked <= last
    assert not keep[: last_masked + 1].any() and keep[last_masked + 1 :].all()


def test_summing_over_dims_instead_of_averaging_would_mask_everything():
    assert not timestep_mask(4 * 64 * 64 * _sd15_log_weight(50), 0.9).any()


def test_at_the_start_the_mask_is_the_large_effect_and_the_weight_the_small_one():
    log_weight = _sd15_log_weight(50)
    keep = timestep_mask(log_weight, 0.9)
    assert (~keep).float().mean().item() == pytest.approx(0.07, abs=0.005)
    inverse = clip_log_weight(-log_weight, 0.1).exp()[keep]
    assert inverse.mean().item() == pytest.approx(1.01, abs=0.003)
    assert inverse.min() >= 1 and inverse.max() <= 1.1 + 1e-6
    assert clip_log_weight(log_weight, 0.1).exp().max() <= 1


@pytest.mark.parametrize(("shift", "cut"), [(1.0, 0.152), (3.0, 0.259), (5.0, 0.321)])
@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon"])
def test_flow_grid_masks_the_clean_end(shift, cut, prediction_type):
    """The epsilon profile mapped by log-SNR (an assumption), over the log-SNRs it covers."""
    schedule = FlowSchedule(shift)
    sigmas = torch.linspace(0.01, 0.93, 9201, dtype=torch.float64)
    log_snr = 2 * ((1 - sigmas) / sigmas).log()
    error = torch.from_numpy(sd15_profile.epsilon_error_at_log_snr(log_snr.numpy()))
    if prediction_type == "flow_prediction":  # x_t is given, so (1 - sigma) dx_0 = -sigma deps, and dv = deps - dx_0
        error = error / (1 - sigmas) ** 2
    level = schedule.level(sigmas)
    rho2 = rho_squared(level, schedule.previous_level(level), prediction_type)
    keep = timestep_mask(log_importance_weight(error.float(), rho2), 0.9)
    first_kept = keep.nonzero().min().item()
    assert keep[first_kept:].all()
    assert sigmas[first_kept].item() == pytest.approx(cut, abs=0.0015)


def test_log_weight_by_hand():
    error = torch.tensor([0.5, 0.0, 2.0], requires_grad=True)
    rho2 = torch.tensor([0.25, 1e6, 0.0])
    log_weight = log_importance_weight(error, rho2)
    assert log_weight.tolist() == [-0.0625, 0.0, 0.0]
    log_weight.sum().backward()
    assert error.grad.tolist() == [-0.125, -5e5, 0.0]


def test_half_precision_errors_are_widened():
    error = torch.tensor([0.3], dtype=torch.bfloat16)
    log_weight = log_importance_weight(error, torch.tensor([0.77]))
    assert log_weight.dtype == torch.float32
    assert torch.equal(log_weight, -(torch.tensor([0.77]) / 2) * error.float())
    assert clip_log_weight(error, 0.1).dtype == pair_log_weight(error, error).dtype == torch.float32


@settings(max_examples=100, deadline=None)
@given(log_weights, log_weights, st.floats(0.01, 0.99))
def test_clip_then_max_is_max_then_clip(chosen, rejected, clip_range):
    """Eq. 19 (clip each inverse weight, take the larger) and A16 (the larger, then clip) agree; so does our min."""
    size = min(len(chosen), len(rejected))
    chosen, rejected = torch.tensor(chosen[:size]), torch.tensor(rejected[:size])
    clip_then_max = torch.maximum(clip_log_weight(-chosen, clip_range), clip_log_weight(-rejected, clip_range))
    max_then_clip = clip_log_weight(torch.maximum(-chosen, -rejected), clip_range)
    ours = clip_log_weight(-pair_log_weight(chosen, rejected), clip_range)
    assert torch.equal(clip_then_max, max_then_clip) and torch.equal(max_then_clip, ours)


@settings(max_examples=100, deadline=None)
@given(log_weights, st.floats(0.01, 0.99))
def test_clipped_weight_is_the_clipped_value(values, clip_range):
    clipped = clip_log_weight(torch.tensor(values, dtype=torch.float64), clip_range).exp()
    for value, got in zip(values, clipped.tolist(), strict=True):
        expected = min(max(math.exp(value), 1 - clip_range), 1 + clip_range)
        assert got == pytest.approx(expected, rel=1e-12)


def test_extreme_log_weights_have_finite_clipped_gradients():
    log_weight = torch.tensor([-1e36, -5e5, -100.0, -0.01, 0.0, 100.0, 1e36], requires_grad=True)
    for sign in (1, -1):
        log_weight.grad = None
        clip_log_weight(sign * log_weight, 0.1).exp().sum().backward()
        inside = [0.0, 0.0, 0.0, sign * math.exp(sign * -0.01), sign, 0.0, 0.0]
        torch.testing.assert_close(log_weight.grad, torch.tensor(inside))


def test_mask_keeps_weights_at_or_above_the_threshold():
    log_weight = torch.tensor([0.9 + 1e-5, 0.9 - 1e-5, 1.0, 1.5, 1e-30]).log().requires_grad_()
    mask = timestep_mask(log_weight, 0.9)
    assert mask.tolist() == [True, False, True, True, False]
    assert mask.dtype == torch.bool and not mask.requires_grad
    # A weight clipped at 1 - clip_range is kept by the default threshold, whatever the rounding of the logarithm.
    assert timestep_mask(clip_log_weight(torch.tensor([-5.0]), 0.1), 1 - 0.1).item()


def test_threshold_zero_keeps_even_a_vanished_weight():
    vanished = torch.tensor([-math.inf, -1e30, 0.0])
    assert timestep_mask(vanished, 0.0).all()
    assert timestep_mask(vanished, 1e-300).tolist() == [False, False, True]


def test_a_weight_that_is_not_a_number_is_not_kept():
    assert timestep_mask(torch.tensor([math.nan, 0.0]), 0.9).tolist() == [False, True]


@pytest.mark.parametrize("clip_range", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_clip_range_outside_the_open_interval(clip_range):
    with pytest.raises(ConfigurationError, match="clip_range="):
        clip_log_weight(torch.zeros(1), clip_range)


@pytest.mark.parametrize("mask_threshold", [-0.1, 1.0, 2.0, math.nan])
def test_mask_threshold_outside_the_interval(mask_threshold):
    with pytest.raises(ConfigurationError, match="mask_threshold="):
        timestep_mask(torch.zeros(1), mask_threshold)


def test_the_weight_of_a_completion_is_the_geometric_mean_over_its_tokens():
    policy = [torch.tensor([0.5, 0.1]), torch.tensor([0.3, 0.2, 0.9])]
    sampled = [torch.tensor([0.25, 0.4]), torch.tensor([0.1, 0.1, 0.6])]
    sums = [torch.stack([token.log().sum() for token in tokens]).requires_grad_() for tokens in (policy, sampled)]
    log_weight = sequence_log_weight(*sums, torch.tensor([2, 3]))
    ratios = [(ours / theirs).double() for ours, theirs in zip(policy, sampled, strict=True)]
    expected = [ratio.prod() ** (1 / len(ratio)) for ratio in ratios]
    assert log_weight.exp().tolist() == pytest.approx([value.item() for value in expected], rel=1e-6)
    assert log_weight[0] < 0 < log_weight[1]
    (gradient,) = torch.autograd.grad(log_weight.sum(), sums[0])
    assert gradient.tolist() == pytest.approx([1 / 2, 1 / 3])


def test_the_weight_of_a_completion_is_wide_and_defined_without_tokens():
    logps = torch.tensor([-300.0, 0.0], dtype=torch.bfloat16)
    log_weight = sequence_log_weight(logps, torch.tensor([-299.0, 0.0]), torch.tensor([10, 0]))
    assert log_weight.dtype == torch.float32
    assert log_weight.tolist() == pytest.approx([-0.1, 0.0])
