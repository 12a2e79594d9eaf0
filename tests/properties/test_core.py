# SPDX-License-Identifier: Apache-2.0
"""Schedules and objectives at whatever levels, shifts, grids, logits and weights."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_sipo.core.importance import log_importance_weight, timestep_mask
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.core.objectives import diffusion_dpo_loss, dpo_cm_loss, poly_dpo_loss, sipo_loss
from trl_sipo.core.objectives._preference_nll import preference_nll
from trl_sipo.core.objectives.soft_label import soft_label_loss
from trl_sipo.core.parameterization import PREDICTION_TYPES
from trl_sipo.core.timestep_sampling import TIME_SAMPLERS, time_quantile
from trl_sipo.core.transition import RHO_SQUARED_MAX, rho_squared

times = st.floats(0.0, 1.0)
shares_below_one = st.floats(0.0, 1.0, exclude_max=True)
logratios = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4)
log_weights = st.floats(-1e30, 0.0)


@st.composite
def vp_schedules(draw):
    """Betas of any size below 1, with or without signal at the end."""
    betas = draw(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=30))
    table = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    if draw(st.booleans()):
        table[-1] = 0.0
    return VPSchedule(table, draw(st.sampled_from([torch.float32, torch.float64])))


@st.composite
def flow_schedules(draw):
    """Shifts to either side, with or without a last sigma."""
    terminal = draw(st.none() | st.floats(0.01, 0.5))
    return FlowSchedule(draw(st.floats(0.05, 20.0)), dtype=torch.float64, shift_terminal=terminal)


def check_pair_of_levels(level, previous):
    """Finite, on the unit circle or line, and the earlier one no noisier."""
    for part in (level, previous):
        for values in (part.alpha_t, part.sigma_t, part.timestep):
            assert torch.isfinite(values).all()
        assert ((part.alpha_t >= 0) & (part.alpha_t <= 1) & (part.sigma_t >= 0) & (part.sigma_t <= 1)).all()
    assert (previous.sigma_t <= level.sigma_t + 1e-9).all() and (previous.alpha_t >= level.alpha_t - 1e-9).all()
    for kind in PREDICTION_TYPES:
        rho2 = rho_squared(level, previous, kind)
        assert ((rho2 >= 0) & (rho2 <= RHO_SQUARED_MAX)).all()


@given(schedule=vp_schedules(), data=st.data())
def test_vp_schedules(schedule, data):
    num_steps = data.draw(st.integers(1, schedule.num_train_timesteps))
    every = torch.arange(schedule.num_train_timesteps)
    level = schedule.level(every)
    torch.testing.assert_close(level.alpha_t**2 + level.sigma_t**2, torch.ones_like(level.alpha_t))
    assert (level.sigma_t.diff() >= 0).all() and (level.log_snr.diff() <= 0).all()
    check_pair_of_levels(level, schedule.previous_level(level, num_steps))
    # There and back: a timestep's own time gives the timestep.
    assert torch.equal(schedule.level_at((every.double() + 0.5) / len(every)).timestep, every)


@given(schedule=flow_schedules(), drawn=st.lists(times, min_size=1, max_size=8), num_steps=st.integers(1, 1000))
def test_flow_schedules(schedule, drawn, num_steps):
    time = torch.tensor(sorted(drawn), dtype=torch.float64)
    level = schedule.level_at(time)
    assert (level.sigma_t.diff() >= 0).all() and torch.equal(level.alpha_t + level.sigma_t, torch.ones_like(time))
    check_pair_of_levels(level, schedule.previous_level(level, num_steps))
    back = level.sigma_t / (schedule.shift - (schedule.shift - 1) * level.sigma_t)
    torch.testing.assert_close(back, time, rtol=1e-9, atol=1e-12)


@given(drawn=times, num_steps=st.integers(1, 1000), shift=st.floats(0.05, 20.0))
def test_a_grid_ends_at_the_clean_end(drawn, num_steps, shift):
    schedule = FlowSchedule(shift, dtype=torch.float64)
    level = schedule.level_at(torch.tensor([drawn], dtype=torch.float64))
    steps = math.ceil(drawn * num_steps)
    assume(steps <= 60)
    for _ in range(steps + 1):
        level = schedule.previous_level(level, num_steps)
    assert level.sigma_t.item() < 1e-9


@pytest.mark.parametrize("sampler", TIME_SAMPLERS)
@given(n=st.integers(0, 100), seed=st.integers(0, 2**63 - 1))
def test_drawn_times(sampler, n, seed):
    time = TIME_SAMPLERS[sampler](n, generator=torch.Generator().manual_seed(seed))
    assert time.shape == (n,) and time.dtype == torch.float32 and ((time >= 0) & (time < 1)).all()
    again = TIME_SAMPLERS[sampler](n, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(time, again)


@given(
    mean=st.floats(-20, 20), std=st.floats(1e-3, 50), shares=st.lists(st.floats(0, 1, exclude_max=True), min_size=1)
)
def test_quantiles_of_times(mean, std, shares):
    time = time_quantile("logit_normal", torch.tensor(sorted(shares), dtype=torch.float64), mean=mean, std=std)
    assert ((time >= 0) & (time < 1)).all() and (time.diff() >= 0).all()


OBJECTIVES = {
    "dpo": lambda c, r, weight, beta: diffusion_dpo_loss(c, r, beta=beta),
    "poly_dpo": lambda c, r, weight, beta: poly_dpo_loss(c, r, beta=beta, alpha=2.0),
    "dpo_cm": lambda c, r, weight, beta: dpo_cm_loss(c, r, weight, weight, beta=beta, clip_range=0.2),
    "sipo": lambda c, r, weight, beta: sipo_loss(c, r, weight, weight, beta=beta, clip_range=0.1),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=60)
@given(chosen=logratios, weight=log_weights, beta=st.floats(1e-3, 1e5), gap=st.floats(-1e3, 1e3, width=32))
def test_objectives_and_their_gradients_are_finite(objective, chosen, weight, beta, gap):
    """The loss of the better pair is no larger; gradients pull the arms apart, and as much one way as the other."""
    loss_of = OBJECTIVES[objective]
    chosen = torch.tensor(chosen, requires_grad=True)
    rejected = (chosen.detach() - gap).requires_grad_()
    log_weight = torch.full_like(chosen.detach(), weight)
    loss = loss_of(chosen, rejected, log_weight, beta)
    assert loss.shape == chosen.shape and torch.isfinite(loss).all() and (loss >= 0).all()
    loss.sum().backward()
    assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad)
    assert (chosen.grad <= 0).all()
    exchanged = loss_of(rejected.detach(), chosen.detach(), log_weight, beta)
    better, worse = (loss, exchanged) if gap >= 0 else (exchanged, loss)
    assert (better <= worse).all()


@given(logit=st.floats(-1e4, 1e4), alpha=st.floats(-1, 20), smoothing=st.floats(0, 0.49), label=st.floats(0, 1))
def test_symmetries_of_the_likelihood(logit, alpha, smoothing, label):
    z = torch.tensor([logit], dtype=torch.float64)
    nll = preference_nll(z, alpha=alpha) - preference_nll(-z, alpha=alpha)
    sides = -z - alpha * torch.tanh(z / 2)  # log sigmoid(-z) - log sigmoid(z), and sigmoid(-z) - sigmoid(z)
    torch.testing.assert_close(nll, sides, rtol=1e-9, atol=1e-9)
    smoothed = preference_nll(z, alpha=alpha, label_smoothing=smoothing)
    as_label = soft_label_loss(lambda part: preference_nll(part, alpha=alpha), z, torch.tensor([1 - smoothing]))
    torch.testing.assert_close(smoothed, as_label, rtol=1e-6, atol=1e-6)
    p = torch.tensor([label], dtype=torch.float64)
    one, other = (soft_label_loss(preference_nll, value, share) for value, share in ((z, p), (-z, 1 - p)))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(error=st.floats(0, 1e30), rho2=st.floats(0, RHO_SQUARED_MAX), threshold=st.floats(0, 1, exclude_max=True))
def test_weights_are_at_most_one(error, rho2, threshold):
    weight = log_importance_weight(torch.tensor([error]), torch.tensor([rho2]))
    assert not weight.isnan().any() and (weight <= 0).all()
    assert timestep_mask(weight, threshold).dtype == torch.bool
    assert timestep_mask(torch.zeros(1), threshold).all()
