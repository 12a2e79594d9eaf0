# SPDX-License-Identifier: Apache-2.0
"""The steps of a stochastic sampler as an MDP, whose actions are Gaussian (D3PO, Yang et al., 2024, Sec. 4).

Legend: t a noise level of the sampler's grid, s the next one, less noisy. The sampler is DDIM with eta = 1 (Song et
al., 2021, Eq. 12 and 16): it draws x_s from p(x_s | x_t) of `transition.posterior_mean_and_variance`.
"""

import torch
from torch import Tensor

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.precision import widen
from trl_sipo.core.transition import posterior_mean_and_variance
from trl_sipo.errors import ConfigurationError


def trajectory_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps of a sampler of `num_steps`, from pure noise on: `T - 1, T - 1 - stride, ...`.

    Each but the last has the next one for its neighbour in `VPSchedule.previous_level`. The last step gives the
    predicted clean latents, which are no draw and have no density.

    Raises:
        ConfigurationError: fewer than two steps, of which none would be a draw, or more than there are timesteps.
    """
    if not 2 <= num_steps <= num_train_timesteps:
        raise ConfigurationError(
            f"A trajectory of {num_steps} steps is not possible: take at least 2 and at most {num_train_timesteps}."
        )
    stride = num_train_timesteps // num_steps
    return [num_train_timesteps - 1 - step * stride for step in range(num_steps)]


def implied_sample(
    noisy_latents: Tensor, next_latents: Tensor, level: NoiseLevel, next_level: NoiseLevel
) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise of which x_t is made and from which x_s is the mean of the next step.

    A model that predicted them would take this very step, without its noise. For any other, with `rho_squared`,

        mean squared distance of x_s from the model's mean, over the variance = rho^2 * mean squared prediction error

    so that the log-probability of the step is, up to a constant and per dimension, `-rho^2 / 2` times the error.

    Args:
        noisy_latents: x_t, `(batch, ...)`, any floating dtype.
        next_latents: x_s, same shape.
        level: t, of which sigma_t is positive.
        next_level: s, less noisy than t, and not the clean end.

    Returns:
        x_0 and eps, `(batch, ...)` each, float32 or wider.
    """
    noisy_latents, next_latents = widen(noisy_latents, next_latents)
    # The mean is linear in the clean latents: its value at zeros and at ones gives offset and slope.
    zeros, ones = torch.zeros_like(noisy_latents), torch.ones_like(noisy_latents)
    offset, _ = posterior_mean_and_variance(noisy_latents, zeros, level, next_level)
    slope, _ = posterior_mean_and_variance(zeros, ones, level, next_level)
    clean = (next_latents - offset) / slope
    alpha_t, sigma_t = level.coefficients_for(noisy_latents)
    return clean, (noisy_latents - alpha_t * clean) / sigma_t
