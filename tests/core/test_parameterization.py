# SPDX-License-Identifier: Apache-2.0
"""Targets, errors and implied clean latents of the four output kinds."""

import pytest
import torch

from tests.oracles import gaussian_chain, sd15_profile
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.core.parameterization import PREDICTION_TYPES, predicted_clean, prediction_error, prediction_target
from trl_sipo.errors import ConfigurationError


def _level(prediction_type: str):
    if prediction_type == "flow_prediction":
        return FlowSchedule(dtype=torch.float64).level(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    return VPSchedule(sd15_profile.alphas_cumprod(), torch.float64).level(torch.tensor([30, 400, 950]))


def _latents():
    return torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_is_what_a_perfect_network_outputs(prediction_type):
    clean, noise = _latents()
    level = _level(prediction_type)
    target = prediction_target(clean, noise, level, prediction_type)
    for i in range(3):
        expected = gaussian_chain.network_output(
            clean[i], noise[i], level.alpha_t[i].item(), level.sigma_t[i].item(), prediction_type
        )
        torch.testing.assert_close(target[i], torch.as_tensor(expected))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predicted_clean_inverts_any_output(prediction_type):
    clean, noise = _latents()
    level = _level(prediction_type)
    noisy = level.add_noise(clean, noise)
    target = prediction_target(clean, noise, level, prediction_type)
    torch.testing.assert_close(predicted_clean(target, noisy, level, prediction_type), clean)
    prediction = target + 0.3 * torch.sin(7 * clean)
    estimate = predicted_clean(prediction, noisy, level, prediction_type)
    for i in range(3):
        expected = gaussian_chain.clean_from_output(
            prediction[i].numpy(),
            noisy[i].numpy(),
            level.alpha_t[i].item(),
            level.sigma_t[i].item(),
            prediction_type,
        )
        torch.testing.assert_close(estimate[i], torch.from_numpy(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_and_clean_agree_with_the_diffusers_schedulers(prediction_type):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=False,
    )
    scheduler.set_timesteps(50)
    level = VPSchedule(scheduler.alphas_cumprod).level(torch.tensor([400]))
    clean, noise = _latents()[:, :1].float()
    noisy = level.add_noise(clean, noise)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, torch.tensor([400])), rtol=1e-5, atol=1e-6)
    if prediction_type == "v_prediction":
        velocity = scheduler.get_velocity(clean, noise, torch.tensor([400]))
        target = prediction_target(clean, noise, level, prediction_type)
        torch.testing.assert_close(target, velocity, rtol=1e-5, atol=1e-6)
    output = torch.cos(3 * noise)
    expected = scheduler.step(output, 400, noisy).pred_original_sample
    torch.testing.assert_close(predicted_clean(output, noisy, level, prediction_type), expected, rtol=1e-4, atol=1e-5)


def test_error_is_a_mean_over_everything_but_the_batch():
    prediction, target = _latents()
    error = prediction_error(prediction, target)
    assert error.shape == (3,)
    for i in range(3):
        pairs = zip(prediction[i].ravel().tolist(), target[i].ravel().tolist(), strict=True)
        expected = sum((p - t) ** 2 for p, t in pairs) / 16
        assert error[i].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_subtraction(dtype):
    prediction, target = _latents().to(dtype)
    error = prediction_error(prediction, target)
    assert error.dtype == torch.float32
    assert torch.equal(error, prediction_error(prediction.float(), target.float()))
    assert not torch.equal(error, (prediction - target).float().square().flatten(1).mean(1))
    assert prediction_error(prediction, target.double()).dtype == torch.float64
    level = _level("v_prediction").to(dtype=torch.float32)
    assert prediction_target(prediction, target, level, "v_prediction").dtype == torch.float32
    assert predicted_clean(prediction, target, level, "v_prediction").dtype == torch.float32


def test_float16_errors_do_not_overflow():
    error = prediction_error(torch.full((1, 4), 300.0, dtype=torch.float16), torch.zeros(1, 4, dtype=torch.float16))
    assert error.item() == 90000.0


@pytest.mark.parametrize("call", [prediction_target, predicted_clean])
def test_unknown_prediction_type_lists_the_known_ones(call):
    clean, noise = _latents()
    with pytest.raises(ConfigurationError, match="'eps'.*epsilon, v_prediction, flow_prediction, sample"):
        call(clean, noise, _level("epsilon"), "eps")
