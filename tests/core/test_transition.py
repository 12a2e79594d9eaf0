# SPDX-License-Identifier: Apache-2.0
"""The posterior and rho^2 against Bayes' rule, Normal densities and the diffusers samplers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.oracles import gaussian_chain, sd15_profile
from trl_sipo.core.importance import log_importance_weight
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
from trl_sipo.core.parameterization import PREDICTION_TYPES, predicted_clean, prediction_error, prediction_target
from trl_sipo.core.transition import RHO_SQUARED_MAX, posterior_mean_and_variance, rho_squared
from trl_sipo.errors import ConfigurationError

SD15 = VPSchedule(sd15_profile.alphas_cumprod(), torch.float64)
FLOW = FlowSchedule(3.0, dtype=torch.float64)

# The prediction types that are defined on each path.
VP_TYPES = ("epsilon", "v_prediction", "sample")
FLOW_TYPES = ("epsilon", "flow_prediction", "sample")
PATHS = [(SD15, VP_TYPES), (FLOW, FLOW_TYPES)]
PATH_AND_TYPE = [
    pytest.param(schedule, kind, id=f"{type(schedule).__name__}-{kind}") for schedule, kinds in PATHS for kind in kinds
]


def _draw(count: int = 3):
    """Clean latents, noise and a prediction error, each `(count, 4, 3, 3)` float64."""
    return torch.randn(3, count, 4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _levels(schedule, times=(0.05, 0.4, 0.97)):
    level = schedule.level_at(torch.tensor(times, dtype=torch.float64))
    return level, schedule.previous_level(level)


def _coefficients(level, previous, i):
    return tuple(values[i].item() for values in (level.alpha_t, level.sigma_t, previous.alpha_t, previous.sigma_t))


@pytest.mark.parametrize("schedule", [SD15, FLOW], ids=["vp", "flow"])
def test_posterior_is_bayes_rule(schedule):
    clean, noise, _ = _draw()
    level, previous = _levels(schedule)
    noisy = level.add_noise(clean, noise)
    mean, variance = posterior_mean_and_variance(noisy, clean, level, previous)
    assert variance.shape == (3,)
    for i in range(3):
        expected = gaussian_chain.bayes_posterior(
            noisy[i].numpy(), clean[i].numpy(), *_coefficients(level, previous, i)
        )
        np.testing.assert_allclose(mean[i].numpy(), expected[0], rtol=1e-9, atol=1e-12)
        assert variance[i].item() == pytest.approx(expected[1], rel=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.floats(1e-3, 0.999), st.floats(1e-3, 0.999), st.floats(-3, 3), st.floats(-3, 3), st.booleans())
def test_posterior_is_bayes_rule_anywhere(first, second, x_0, eps, flow):
    assume(abs(first - second) > 1e-3)
    sigma_s, sigma_t = sorted((first, second))
    alpha_s, alpha_t = (1 - s if flow else math.sqrt(1 - s * s) for s in (sigma_s, sigma_t))
    level, previous = (
        NoiseLevel(*torch.tensor([[a], [s]], dtype=torch.float64), torch.tensor([0]))
        for a, s in ((alpha_t, sigma_t), (alpha_s, sigma_s))
    )
    x_t = alpha_t * x_0 + sigma_t * eps
    mean, variance = posterior_mean_and_variance(
        torch.tensor([[x_t]], dtype=torch.float64), torch.tensor([[x_0]], dtype=torch.float64), level, previous
    )
    expected = gaussian_chain.bayes_posterior(x_t, x_0, alpha_t, sigma_t, alpha_s, sigma_s)
    assert mean.item() == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
    assert variance.item() == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("prediction_type", VP_TYPES)
@pytest.mark.parametrize("timestep", [20, 60, 500, 980])
def test_posterior_is_a_ddim_step_with_eta_one(prediction_type, timestep):
    scheduler = _ddim(prediction_type)
    schedule = VPSchedule(scheduler.alphas_cumprod, torch.float64)
    level = schedule.level(torch.tensor([timestep]))
    previous = schedule.previous_level(level, 50)
    clean, noise, output = _draw(1)
    noisy = level.add_noise(clean, noise)
    step = scheduler.step(output, timestep, noisy, eta=1.0, variance_noise=torch.zeros_like(noisy))
    estimate = predicted_clean(output, noisy, level, prediction_type)
    torch.testing.assert_close(estimate, step.pred_original_sample, rtol=1e-9, atol=1e-9)
    mean, variance = posterior_mean_and_variance(noisy, estimate, level, previous)
    torch.testing.assert_close(mean, step.prev_sample, rtol=1e-9, atol=1e-9)
    assert variance.item() == pytest.approx(scheduler._get_variance(timestep, timestep - 20).item(), rel=1e-9)


def test_below_one_stride_a_ddim_step_lands_on_the_clean_latents():
    scheduler = _ddim("epsilon")
    schedule = VPSchedule(scheduler.alphas_cumprod, torch.float64)
    level = schedule.level(torch.tensor([0]))
    clean, noise, output = _draw(1)
    noisy = level.add_noise(clean, noise)
    step = scheduler.step(output, 0, noisy, eta=1.0, variance_noise=torch.zeros_like(noisy))
    estimate = predicted_clean(output, noisy, level, "epsilon")
    mean, variance = posterior_mean_and_variance(noisy, estimate, level, schedule.previous_level(level))
    torch.testing.assert_close(mean, step.prev_sample, rtol=1e-9, atol=1e-9)
    assert variance.item() == 0.0 == scheduler._get_variance(0, -20).item()


@pytest.mark.parametrize("timestep", [1, 40, 999])
@pytest.mark.parametrize("prediction_type", VP_TYPES)
def test_posterior_is_a_ddpm_step_with_the_small_variance(prediction_type, timestep):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**_SD15_CONFIG, prediction_type=prediction_type, variance_type="fixed_small")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = VPSchedule(scheduler.alphas_cumprod, torch.float64)
    level = schedule.level(torch.tensor([timestep]))
    clean, noise, output = _draw(1)
    noisy = level.add_noise(clean, noise)
    drawn = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = scheduler.step(output, timestep, noisy, generator=torch.Generator().manual_seed(3))
    estimate = predicted_clean(output, noisy, level, prediction_type)
    mean, variance = posterior_mean_and_variance(noisy, estimate, level, schedule.previous_level(level, 1000))
    # DDPM's coefficients come from its float32 betas.
    torch.testing.assert_close(mean + variance.sqrt() * drawn, step.prev_sample, rtol=1e-4, atol=1e-4)
    assert variance.item() == pytest.approx(scheduler._get_variance(timestep).item(), rel=1e-9)


_SD15_CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def _ddim(prediction_type):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**_SD15_CONFIG, prediction_type=prediction_type)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(50)
    return scheduler


@pytest.mark.parametrize(("schedule", "prediction_type"), PATH_AND_TYPE)
def test_log_weight_is_the_mean_normal_log_density_ratio(schedule, prediction_type):
    """The noise of x_s integrated out: mean over dims of E_q[log p_theta - log q]."""
    clean, noise, error = _draw()
    level, previous = _levels(schedule)
    noisy = level.add_noise(clean, noise)
    target = prediction_target(clean, noise, level, prediction_type)
    prediction = target - 0.4 * error
    log_weight = log_importance_weight(
        prediction_error(prediction, target), rho_squared(level, previous, prediction_type)
    )
    for i in range(3):
        coefficients = _coefficients(level, previous, i)
        x_t = noisy[i].numpy()
        estimate = gaussian_chain.clean_from_output(prediction[i].numpy(), x_t, *coefficients[:2], prediction_type)
        mean_q, variance = gaussian_chain.bayes_posterior(x_t, clean[i].numpy(), *coefficients)
        mean_p, _ = gaussian_chain.bayes_posterior(x_t, estimate, *coefficients)
        expected = gaussian_chain.expected_log_density_ratio(mean_q, mean_p, variance)
        assert log_weight[i].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("schedule", "prediction_type"), PATH_AND_TYPE)
def test_a_drawn_x_s_adds_a_term_of_mean_zero(schedule, prediction_type):
    """Per draw, log p - log q = log w + sign * rho * mean(z * delta); over many draws the extra term averages out."""
    clean, noise, error = _draw(1)
    level, previous = _levels(schedule, (0.3,))
    target = prediction_target(clean, noise, level, prediction_type)
    delta = 0.4 * error
    rho2 = rho_squared(level, previous, prediction_type)
    log_weight = log_importance_weight(prediction_error(target - delta, target), rho2).item()

    coefficients = _coefficients(level, previous, 0)
    x_t = level.add_noise(clean, noise)[0].numpy()
    output = (target - delta)[0].numpy()
    estimate = gaussian_chain.clean_from_output(output, x_t, *coefficients[:2], prediction_type)
    mean_q, variance = gaussian_chain.bayes_posterior(x_t, clean[0].numpy(), *coefficients)
    mean_p, _ = gaussian_chain.bayes_posterior(x_t, estimate, *coefficients)
    z = np.random.default_rng(0).standard_normal((20_000, *x_t.shape))
    x_s = mean_q + math.sqrt(variance) * z
    log_p = gaussian_chain.normal_log_density(x_s, mean_p, variance)
    log_q = gaussian_chain.normal_log_density(x_s, mean_q, variance)
    drawn = (log_p - log_q).mean(axis=(1, 2, 3))

    sign = -1 if prediction_type == "sample" else 1
    extra = sign * math.sqrt(rho2.item()) * (z * delta[0].numpy()).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(drawn, log_weight + extra, rtol=1e-7, atol=1e-9)
    standard_error = drawn.std() / math.sqrt(len(drawn))
    assert abs(drawn.mean() - log_weight) < 4 * standard_error
    assert standard_error < 0.05 * abs(log_weight)


@pytest.mark.parametrize(("schedule", "prediction_type"), PATH_AND_TYPE)
def test_rho_squared_is_the_mean_shift_in_units_of_the_deviation(schedule, prediction_type):
    clean, noise, error = _draw()
    level, previous = _levels(schedule)
    noisy = level.add_noise(clean, noise)
    target = prediction_target(clean, noise, level, prediction_type)
    estimate = predicted_clean(target + error, noisy, level, prediction_type)
    mean_q, variance = posterior_mean_and_variance(noisy, clean, level, previous)
    mean_p, _ = posterior_mean_and_variance(noisy, estimate, level, previous)
    shift = (mean_q - mean_p).square().flatten(1).sum(1) / variance
    torch.testing.assert_close(
        shift, rho_squared(level, previous, prediction_type) * error.square().flatten(1).sum(1), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(
        shift, (previous.snr - level.snr) * (clean - estimate).square().flatten(1).sum(1), rtol=1e-7, atol=0
    )


def test_stochastic_flow_step_of_the_literature_meets_ours_at_noise_sqrt_two():
    """Flow-GRPO: rho^2 = (1 + a^2 / 2)^2 |dt| (1 - s) / (a^2 s), equal to ours in small steps only at a^2 = 2."""
    sigma = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    step = 1e-5
    schedule = FlowSchedule(dtype=torch.float64)
    level = schedule.level(sigma)
    ours = rho_squared(level, schedule.level(sigma - step), "flow_prediction")
    for a_squared, equal in ((2.0, True), (0.49, False), (4.0, False)):
        theirs = (1 + a_squared / 2) ** 2 * step * (1 - sigma) / (a_squared * sigma)
        assert torch.allclose(ours, theirs, rtol=1e-3) is equal


@pytest.mark.parametrize(("schedule", "prediction_type"), PATH_AND_TYPE)
@pytest.mark.parametrize("num_steps", [10, 50, 100])
def test_float32_levels_are_precise_enough(schedule, prediction_type, num_steps):
    level, _ = _levels(schedule, tuple(np.linspace(0.02, 0.98, 49)))
    exact = rho_squared(level, schedule.previous_level(level, num_steps), prediction_type)
    narrow = rho_squared(
        level.to(dtype=torch.float32),
        schedule.previous_level(level, num_steps).to(dtype=torch.float32),
        prediction_type,
    )
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-4, atol=0)


def _degenerate_levels():
    """Every corner: t = 0, below one stride, equal levels, zero terminal SNR, sigma = 1, sigma = 0, tiny sigma_s."""
    table = torch.cat([sd15_profile.alphas_cumprod()[:-1], torch.zeros(1, dtype=torch.float64)])
    for dtype in (torch.float32, torch.float64):
        vp, flow = VPSchedule(table, dtype), FlowSchedule(5.0, dtype=dtype)
        level = vp.level(torch.tensor([0, 1, 19, 20, 500, 979, 999]))
        yield level, vp.previous_level(level)
        yield level, level
        level = flow.level(torch.tensor([0.0, 1e-30, 1e-6, 0.02, 0.09, 0.5, 1.0]))
        yield level, flow.previous_level(level)
        yield level, level
        yield level, flow.level(level.sigma_t * 1e-30)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_rho_squared_and_weights_are_finite_in_every_corner(prediction_type):
    for level, previous in _degenerate_levels():
        rho2 = rho_squared(level, previous, prediction_type)
        assert rho2.shape == level.sigma_t.shape and rho2.dtype == level.sigma_t.dtype
        assert rho2.isfinite().all() and (rho2 >= 0).all() and (rho2 <= RHO_SQUARED_MAX).all(), rho2
        for error in (0.0, 1e-12, 1.0, 1e30):
            error = torch.full_like(rho2, error, requires_grad=True)
            log_weight = log_importance_weight(error, rho2)
            log_weight.exp().sum().backward()
            assert log_weight.isfinite().all() and error.grad.isfinite().all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_without_a_predecessor_rho_squared_is_the_cap(prediction_type):
    level = SD15.level(torch.tensor([0, 7, 19, 20]))
    rho2 = rho_squared(level, SD15.previous_level(level), prediction_type)
    assert rho2[:3].tolist() == [RHO_SQUARED_MAX] * 3 and rho2[3] < RHO_SQUARED_MAX
    # Rounding leaves 0.02 - 1/50 a hair above zero, and the cap still holds.
    flow = FlowSchedule()
    level = flow.level(torch.tensor([0.0, 1e-3, 0.02]))
    rho2 = rho_squared(level, flow.previous_level(level), "sample")
    assert rho2.tolist() == [RHO_SQUARED_MAX] * 3
    assert log_importance_weight(torch.full((3,), 1e-3), rho2).exp().max().item() == 0.0


def test_equal_levels_need_no_correction():
    level = SD15.level(torch.tensor([20, 500, 980]))
    for prediction_type in VP_TYPES:
        assert rho_squared(level, level, prediction_type).max().item() < 1e-9


def test_zero_terminal_snr_is_finite_for_v_prediction_and_capped_for_epsilon():
    table = torch.cat([sd15_profile.alphas_cumprod()[:-1], torch.zeros(1, dtype=torch.float64)])
    schedule = VPSchedule(table)
    level = schedule.level(torch.tensor([999]))
    previous = schedule.previous_level(level)
    snr = (table[979] / (1 - table[979])).item()
    assert rho_squared(level, previous, "v_prediction").item() == pytest.approx(snr, rel=1e-5)
    assert rho_squared(level, previous, "sample").item() == pytest.approx(snr, rel=1e-5)
    assert rho_squared(level, previous, "epsilon").item() == RHO_SQUARED_MAX


@pytest.mark.parametrize("snr_shift_scale", [3.0, 1.0], ids=["2b", "5b"])
def test_cogvideox_schedule_keeps_its_noisy_end(snr_shift_scale):
    from diffusers import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
        timestep_spacing="trailing",
    )
    assert scheduler.alphas_cumprod[-1].item() == 0.0
    schedule = VPSchedule(scheduler.alphas_cumprod)
    level = schedule.level(torch.arange(1000))
    previous = schedule.previous_level(level)
    rho2 = rho_squared(level, previous, "v_prediction")
    abar = scheduler.alphas_cumprod.double()
    abar_s, abar_t = abar[:-20], abar[20:]
    expected = (1 - abar_t) * abar_s / (1 - abar_s) - abar_t
    torch.testing.assert_close(rho2[20:].double(), expected, rtol=1e-3, atol=1e-6)
    weight = log_importance_weight(torch.full((1000,), 0.5), rho2).exp()
    assert weight.isfinite().all() and (weight[:20] == 0).all()
    assert weight[-1] > 0.9 and (weight[20:500].diff() > 0).all()


def test_posterior_is_finite_in_every_corner():
    generator = torch.Generator().manual_seed(2)
    for level, previous in _degenerate_levels():
        clean, noise = torch.randn(2, 7, 4, generator=generator)
        mean, variance = posterior_mean_and_variance(level.add_noise(clean, noise), clean, level, previous)
        assert mean.isfinite().all() and variance.isfinite().all() and (variance >= 0).all()


def test_half_precision_latents_are_widened():
    clean, noise, _ = _draw().to(torch.bfloat16)
    level, previous = (level.to(dtype=torch.float32) for level in _levels(SD15))
    mean, variance = posterior_mean_and_variance(noise, clean, level, previous)
    assert mean.dtype == variance.dtype == torch.float32
    assert torch.equal(mean, posterior_mean_and_variance(noise.float(), clean.float(), level, previous)[0])


def test_unknown_prediction_type_lists_the_known_ones():
    level, previous = _levels(SD15)
    with pytest.raises(ConfigurationError, match="'x0'.*epsilon, v_prediction, flow_prediction, sample"):
        rho_squared(level, previous, "x0")
