# SPDX-License-Identifier: Apache-2.0
"""MaPO, margin-aware preference optimization without a reference (Hong et al., 2024)."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_sipo.core.precision import widen
from trl_sipo.errors import ConfigurationError

# Below it the quotient is 0 / 0 in float32, and its Taylor series exact to rounding.
_SMALL = 1e-2


def check_mapo_settings(beta: float, snr_value: float) -> None:
    """Raise ConfigurationError unless beta and snr_value are positive and finite."""
    for name, value in (("beta", beta), ("snr_value", snr_value)):
        if not 0 < value < float("inf"):
            raise ConfigurationError(f"{name}={value} must be positive and finite; the authors' is 0.1 and 0.5.")


def mapo_score(error: Tensor, snr_value: float) -> Tensor:
    """`x / (exp(x) - 1)` with `x = snr_value * error`: 1 for a perfect prediction, falling to 0, and so bounded.

    Args:
        error: `(batch,)`, squared errors averaged over dims; not negative.
        snr_value: positive; the constant in place of the weight of the noise level.

    Returns:
        `(batch,)`, float32 or wider, in (0, 1].
    """
    (error,) = widen(error)
    x = snr_value * error
    is_small = x < _SMALL
    safe = torch.where(is_small, 1.0, x)  # before the division: its gradient at 0 would be NaN
    # With exp(-x), which does not overflow.
    return torch.where(is_small, 1 - x / 2 + x.square() / 12, safe * (-safe).exp() / -torch.expm1(-safe))


def mapo_logit(chosen_error: Tensor, rejected_error: Tensor, *, snr_value: float, num_timesteps: int) -> Tensor:
    """`num_timesteps * (score of the chosen sample - score of the rejected one)`; arguments as of `mapo_loss`."""
    return num_timesteps * (mapo_score(chosen_error, snr_value) - mapo_score(rejected_error, snr_value))


def mapo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    *,
    beta: float = 0.1,
    snr_value: float = 0.5,
    num_timesteps: int = 1000,
) -> Tensor:
    """`chosen_error - beta * log sigmoid(logit)`: the denoising loss on the chosen sample, and a margin of scores.

    Args:
        chosen_error: `(batch,)`, squared error of the chosen sample, averaged over dims.
        rejected_error: `(batch,)`, of the rejected one, at the same noise level.
        beta: positive; the weight of the margin. It is no pull to a reference: there is none.
        snr_value: positive; see `mapo_score`.
        num_timesteps: of the schedule; the margin of one step stands for that of all.

    Returns:
        The unreduced loss `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: a setting out of range.
    """
    check_mapo_settings(beta, snr_value)
    assert chosen_error.ndim == 1 and chosen_error.shape == rejected_error.shape, "need (batch,) twice"
    chosen_error, rejected_error = widen(chosen_error, rejected_error)
    logit = mapo_logit(chosen_error, rejected_error, snr_value=snr_value, num_timesteps=num_timesteps)
    return chosen_error - beta * logsigmoid(logit)
