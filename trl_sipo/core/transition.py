# SPDX-License-Identifier: Apache-2.0
"""One reverse step: the true posterior, and how far a prediction error moves it.

Legend: t the current noise level, s its less noisy neighbour on the sampler grid. The Markov chain with marginals
`x_t = alpha_t x_0 + sigma_t eps` has the Gaussian posterior q(x_s | x_t, x_0); the model's p_theta(x_s | x_t) is the
same Gaussian with the model's own x_0 in place of the true one. For variance-preserving schedules this is one step of
DDIM with eta = 1 (Song et al., 2021, Eq. 12 and 16), also known as DDPM with the small fixed variance
(Ho et al., 2020, Eq. 7).
"""

import torch
from torch import Tensor

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.parameterization import check_prediction_type
from trl_sipo.core.precision import per_sample, widen

RHO_SQUARED_MAX = 1e6
"""Cap on rho^2. At the clean end rho^2 diverges; the cap keeps w effectively 0 there and every gradient finite."""


def posterior_mean_and_variance(
    noisy_latents: Tensor, clean_latents: Tensor, level: NoiseLevel, previous_level: NoiseLevel
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x_0). With the model's x0_hat as `clean_latents`: of p_theta(x_s | x_t).

    Args:
        noisy_latents: x_t, `(batch, ...)`, any floating dtype.
        clean_latents: x_0, same shape.
        level: t.
        previous_level: s, no noisier than t.

    Returns:
        The mean `(batch, ...)` and the variance of each coordinate `(batch,)`, float32 or wider. Without a
        predecessor (sigma_s = 0) the mean is x_0 and the variance 0.
    """
    assert noisy_latents.shape == clean_latents.shape, (noisy_latents.shape, clean_latents.shape)
    noisy_latents, clean_latents = widen(noisy_latents, clean_latents)
    alpha_t, sigma_t = level.alpha_t, level.sigma_t
    alpha_s, sigma_s = previous_level.alpha_t, previous_level.sigma_t
    # x_t given x_s is N(step_alpha x_s, ...); two pure-noise levels have nothing left to scale.
    step_alpha = torch.where(alpha_s > 0, alpha_t / alpha_s, 1.0)
    # The ratio lies in [0, 1]; squares of a tiny sigma alone would underflow, and the clean end would be 0 / 0.
    ratio = torch.where(sigma_t > 0, sigma_s / sigma_t, 0.0)
    new_share = 1 - (step_alpha * ratio) ** 2  # of the noise of x_t, what the step s -> t added
    noisy_scale = per_sample(step_alpha * ratio**2, noisy_latents)
    clean_scale = per_sample(alpha_s * new_share, clean_latents)
    return noisy_scale * noisy_latents + clean_scale * clean_latents, new_share * sigma_s**2


def rho_squared(level: NoiseLevel, previous_level: NoiseLevel, prediction_type: str) -> Tensor:
    """The rho^2 of the importance weight `log w = -(rho^2 / 2) * error`, in the network's own output space.

    `||mu(x_0) - mu(x0_hat)||^2 / variance = rho^2 * ||target - prediction||^2`, which is
    `(SNR_s - SNR_t) * ||x_0 - x0_hat||^2`:

    - `sample`: `alpha_s^2 / sigma_s^2 - alpha_t^2 / sigma_t^2`
    - `epsilon`: `alpha_s^2 sigma_t^2 / (sigma_s^2 alpha_t^2) - 1`
    - `v_prediction`, `flow_prediction`: `sigma_t^2 alpha_s^2 / sigma_s^2 - alpha_t^2` (finite at zero terminal SNR)

    Args:
        level: t.
        previous_level: s, no noisier than t.
        prediction_type: one of `PREDICTION_TYPES`.

    Returns:
        `(batch,)`, float32 or wider, in [0, RHO_SQUARED_MAX], never NaN; the cap where s does not exist
        (sigma_s = 0) or where an `epsilon` output says nothing about x_0 (alpha_t = 0).

    Raises:
        ConfigurationError: unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    alpha_t, sigma_t = level.alpha_t, level.sigma_t
    # sigma_t^2 (SNR_s - SNR_t), free of 0 / 0 at zero terminal SNR.
    velocity_form = (sigma_t * previous_level.alpha_t / previous_level.sigma_t) ** 2 - alpha_t**2
    scale = {
        "epsilon": alpha_t**2,
        "v_prediction": torch.ones_like(alpha_t),
        "flow_prediction": torch.ones_like(alpha_t),
        "sample": sigma_t**2,
    }[prediction_type]
    # Decided before the clamp: the corners hold 0 / 0, and a NaN would pass through it.
    is_defined = (previous_level.sigma_t > 0) & (scale > 0)
    return torch.where(is_defined, velocity_form / scale, RHO_SQUARED_MAX).clamp(0.0, RHO_SQUARED_MAX)
