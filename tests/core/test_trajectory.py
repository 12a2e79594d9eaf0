# SPDX-License-Identifier: Apache-2.0
"""Steps of a sampler as samples: the implied clean latents and noise, and the probability of a step by two ways."""

import pytest
import torch

from tests.oracles import sd15_profile
from tests.oracles.gaussian_chain import bayes_posterior, clean_from_output
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.core.parameterization import prediction_error, prediction_target
from trl_sipo.core.trajectory import implied_sample, trajectory_timesteps
from trl_sipo.core.transition import rho_squared
from trl_sipo.errors import ConfigurationError

STEPS = 20


def _levels(prediction_type):
    if prediction_type == "flow_prediction":
        schedule = FlowSchedule(3.0, dtype=torch.float64)
        level = schedule.level(torch.tensor([1.0, 0.9, 0.5, 0.3], dtype=torch.float64))
    else:
        schedule = VPSchedule(sd15_profile.alphas_cumprod(), torch.float64)
        level = schedule.level(torch.tensor([999, 749, 399, 99]))
    return level, schedule.previous_level(level, STEPS)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction", "sample"])
def test_the_error_times_rho_squared_is_the_distance_of_the_step(prediction_type):
    """Against the posterior by Bayes' rule, for any step and any prediction."""
    generator = torch.Generator().manual_seed(2)
    noisy, following, prediction = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    level, next_level = _levels(prediction_type)
    clean, noise = implied_sample(noisy, following, level, next_level)
    torch.testing.assert_close(level.add_noise(clean, noise), noisy)
    error = prediction_error(prediction, prediction_target(clean, noise, level, prediction_type))
    for row in range(4):
        alpha_t, sigma_t = level.alpha_t[row].item(), level.sigma_t[row].item()
        alpha_s, sigma_s = next_level.alpha_t[row].item(), next_level.sigma_t[row].item()
        x_t, x_s = noisy[row].numpy(), following[row].numpy()
        predicted = clean_from_output(prediction[row].numpy(), x_t, alpha_t, sigma_t, prediction_type)
        mean, variance = bayes_posterior(x_t, predicted, alpha_t, sigma_t, alpha_s, sigma_s)
        expected = ((x_s - mean) ** 2).mean() / variance
        actual = rho_squared(level, next_level, prediction_type)[row] * error[row]
        assert actual.item() == pytest.approx(expected, rel=1e-9)
        # And the mean of the step from the implied clean latents is where it ended.
        mean, _ = bayes_posterior(x_t, clean[row].numpy(), alpha_t, sigma_t, alpha_s, sigma_s)
        torch.testing.assert_close(torch.from_numpy(mean), following[row])


def test_the_timesteps_are_the_neighbours_of_one_another():
    schedule = VPSchedule(sd15_profile.alphas_cumprod())
    for num_steps in (2, 7, 20, 50):
        timesteps = torch.tensor(trajectory_timesteps(num_steps))
        assert len(timesteps) == num_steps and timesteps[0] == 999
        following = schedule.previous_level(schedule.level(timesteps[:-1]), num_steps)
        assert torch.equal(following.timestep, timesteps[1:]) and (following.sigma_t > 0).all()


@pytest.mark.parametrize("num_steps", [0, 1, 1001])
def test_trajectories_without_a_draw_are_refused(num_steps):
    with pytest.raises(ConfigurationError, match=f"{num_steps} steps"):
        trajectory_timesteps(num_steps)
