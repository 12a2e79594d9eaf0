# SPDX-License-Identifier: Apache-2.0
"""What a network predicts: targets, errors and the implied clean latents, for the four output kinds.

Legend: x_0 clean latents, eps noise, x_t noisy latents. `v_prediction` (Salimans and Ho, 2022) presumes a
variance-preserving level (`alpha_t^2 + sigma_t^2 = 1`), `flow_prediction` a flow level (`alpha_t + sigma_t = 1`).
"""

from collections.abc import Callable

from torch import Tensor

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.precision import widen
from trl_sipo.errors import ConfigurationError

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction", "sample")

# (x_0, eps, alpha_t, sigma_t) -> target
_TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x_0, eps, alpha_t, sigma_t: eps,
    "v_prediction": lambda x_0, eps, alpha_t, sigma_t: alpha_t * eps - sigma_t * x_0,
    "flow_prediction": lambda x_0, eps, alpha_t, sigma_t: eps - x_0,
    "sample": lambda x_0, eps, alpha_t, sigma_t: x_0,
}

# (prediction, x_t, alpha_t, sigma_t) -> x_0
_PREDICTED_CLEAN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda prediction, x_t, alpha_t, sigma_t: (x_t - sigma_t * prediction) / alpha_t,
    "v_prediction": lambda prediction, x_t, alpha_t, sigma_t: alpha_t * x_t - sigma_t * prediction,
    "flow_prediction": lambda prediction, x_t, alpha_t, sigma_t: x_t - sigma_t * prediction,
    "sample": lambda prediction, x_t, alpha_t, sigma_t: prediction,
}


def check_prediction_type(prediction_type: str) -> None:
    """Raise ConfigurationError, listing the known ones, unless `prediction_type` is in `PREDICTION_TYPES`."""
    if prediction_type not in PREDICTION_TYPES:
        raise ConfigurationError(
            f"Unknown prediction_type={prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}. It comes from the "
            "scheduler's config."
        )


def prediction_target(clean_latents: Tensor, noise: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """What the network should have predicted.

    Args:
        clean_latents: x_0, `(batch, ...)`, any floating dtype.
        noise: eps, same shape.
        level: the noise level of each sample.
        prediction_type: one of `PREDICTION_TYPES`.

    Returns:
        `(batch, ...)`, float32 or wider.

    Raises:
        ConfigurationError: unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    assert clean_latents.shape == noise.shape, (clean_latents.shape, noise.shape)
    clean_latents, noise = widen(clean_latents, noise)
    return _TARGETS[prediction_type](clean_latents, noise, *level.coefficients_for(clean_latents))


def prediction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, over all its non-batch dims.

    A mean, not a sum: beta and the importance weight are defined on it.

    Args:
        prediction: `(batch, ...)`, any floating dtype; cast before the subtraction.
        target: same shape.

    Returns:
        `(batch,)`, float32 or wider.
    """
    assert prediction.shape == target.shape, (prediction.shape, target.shape)
    prediction, target = widen(prediction, target)
    return (prediction - target).square().flatten(start_dim=1).mean(dim=1)


def predicted_clean(prediction: Tensor, noisy_latents: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """The clean latents that a prediction implies, x0_hat.

    Args:
        prediction: the network's output, `(batch, ...)`, any floating dtype.
        noisy_latents: x_t, same shape.
        level: the noise level of each sample.
        prediction_type: one of `PREDICTION_TYPES`.

    Returns:
        `(batch, ...)`, float32 or wider. Not finite for `epsilon` where `alpha_t = 0`: there the noise says nothing
        about x_0.

    Raises:
        ConfigurationError: unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    assert prediction.shape == noisy_latents.shape, (prediction.shape, noisy_latents.shape)
    prediction, noisy_latents = widen(prediction, noisy_latents)
    return _PREDICTED_CLEAN[prediction_type](prediction, noisy_latents, *level.coefficients_for(noisy_latents))
