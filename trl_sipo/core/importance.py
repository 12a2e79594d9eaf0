# SPDX-License-Identifier: Apache-2.0
"""Importance weights, w = p_theta(x_s | x_t) / q(x_s | x_t, x_0) of a timestep, and the mask they give.

SIPO (Eq. 5, 12, 19). Everything is in the log domain: at the clean end w underflows and 1 / w overflows, and clipping
after the exponential leaves NaN gradients. Of a language model's completion there is one weight too.
"""

import math

import torch
from torch import Tensor

from trl_sipo.core.precision import widen
from trl_sipo.errors import ConfigurationError


def check_clip_range(clip_range: float) -> None:
    """Raise ConfigurationError unless 0 < clip_range < 1."""
    if not 0 < clip_range < 1:
        raise ConfigurationError(
            f"clip_range={clip_range} must lie strictly between 0 and 1: weights are clipped to [1 - clip_range, "
            "1 + clip_range]. The usual value is 0.1."
        )


def check_mask_threshold(mask_threshold: float) -> None:
    """Raise ConfigurationError unless 0 <= mask_threshold < 1."""
    if not 0 <= mask_threshold < 1:
        raise ConfigurationError(
            f"mask_threshold={mask_threshold} must lie in [0, 1): it is the importance weight below which a timestep "
            "is dropped. The usual value is 1 - clip_range."
        )


def log_importance_weight(error: Tensor, rho_squared: Tensor) -> Tensor:
    """log w of one sample at one timestep, `-(rho^2 / 2) * error`.

    The noise of x_s is integrated out, which makes it the negative Kullback-Leibler divergence of p_theta from q per
    dimension: deterministic and at most 0.

    Args:
        error: `(batch,)` mean squared error in the network's output space, any floating dtype.
        rho_squared: `(batch,)`, from `transition.rho_squared` for the same prediction type.

    Returns:
        `(batch,)`, float32 or wider; differentiable w.r.t. `error`.
    """
    assert error.shape == rho_squared.shape, (error.shape, rho_squared.shape)
    error, rho_squared = widen(error, rho_squared)
    return -(rho_squared / 2) * error


def sequence_log_weight(logps: Tensor, sampled_logps: Tensor, lengths: Tensor) -> Tensor:
    """log w of one completion y of a language model, `(log p_theta(y | x) - log mu(y | x)) / |y|`.

    w is the geometric mean over the tokens of p_theta / mu, mu the policy that wrote the completion: the ratio of GSPO
    (2507.18071), per sequence and normalised by its length. Unlike [`log_importance_weight`] it may exceed 0.

    Args:
        logps: `(batch,)` log-probability of the completion under the policy, summed over its tokens.
        sampled_logps: `(batch,)`, of the same tokens under the policy that wrote them.
        lengths: `(batch,)` number of these tokens; 0 (nothing left by truncation) gives log w = 0 with equal sums.

    Returns:
        `(batch,)`, float32 or wider; differentiable w.r.t. `logps`.
    """
    assert logps.shape == sampled_logps.shape == lengths.shape, (logps.shape, sampled_logps.shape, lengths.shape)
    logps, sampled_logps = widen(logps, sampled_logps)
    return (logps - sampled_logps) / lengths.clamp(min=1)


def pair_log_weight(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The shared log weight of a pair, `min(chosen, rejected)`: SIPO Eq. 19's `max(1/w_w, 1/w_l)` in logs.

    Args:
        chosen: `(batch,)` log weights.
        rejected: `(batch,)`.

    Returns:
        `(batch,)`, float32 or wider; at a tie the gradient is halved between the two.
    """
    assert chosen.shape == rejected.shape, (chosen.shape, rejected.shape)
    return torch.minimum(*widen(chosen, rejected))


def clip_log_weight(log_weight: Tensor, clip_range: float) -> Tensor:
    """Clamp a log weight to `[log(1 - clip_range), log(1 + clip_range)]` (SIPO Eq. 12); take its exp afterwards.

    For the inverse weight of Eq. 19 pass the negated log weight.

    Args:
        log_weight: `(batch,)`.
        clip_range: strictly between 0 and 1.

    Returns:
        `(batch,)`, float32 or wider; no gradient where it is clipped.

    Raises:
        ConfigurationError: `clip_range` out of range.
    """
    check_clip_range(clip_range)
    (log_weight,) = widen(log_weight)
    return log_weight.clamp(math.log(1 - clip_range), math.log(1 + clip_range))


def timestep_mask(pair_log_weight: Tensor, mask_threshold: float) -> Tensor:
    """Which pairs to keep: those whose weight is at least `mask_threshold`.

    Args:
        pair_log_weight: `(batch,)`.
        mask_threshold: in [0, 1); 0 keeps every pair.

    Returns:
        `(batch,)` bool, True = keep, without gradient. A NaN weight is not kept (unless the threshold is 0).

    Raises:
        ConfigurationError: `mask_threshold` out of range.
    """
    check_mask_threshold(mask_threshold)
    (log_weight,) = widen(pair_log_weight.detach())
    if mask_threshold == 0:
        return torch.ones_like(log_weight, dtype=torch.bool)
    return log_weight >= math.log(mask_threshold)
