# SPDX-License-Identifier: Apache-2.0
"""What the variance-preserving backbones read from a scheduler's configuration.

Only the configuration is read, never the scheduler's state: inference overwrites the state, and samplers such as
Euler keep a rescaled, variance-exploding copy of the schedule in it.
"""

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler

from trl_sipo.core.noise_schedule import VPSchedule
from trl_sipo.errors import BackboneError

VP_PREDICTION_TYPES = ("epsilon", "v_prediction")

_BETA_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
# CogVideoX divides the signal-to-noise ratio by it, before the rescaling to zero; DDPMScheduler drops it.
_SHIFT_FIELD = "snr_shift_scale"


def vp_prediction_type(scheduler: Any) -> str:
    """`"epsilon"` or `"v_prediction"`, from the scheduler's configuration.

    Raises:
        BackboneError: if the configuration says anything else, or nothing.
    """
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type not in VP_PREDICTION_TYPES:
        raise BackboneError(
            f"The {type(scheduler).__name__} has prediction_type={prediction_type!r}; this backbone trains with "
            f"{' or '.join(map(repr, VP_PREDICTION_TYPES))}. If the model's output is one of these, set it with "
            "`pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, "
            "prediction_type=...)`."
        )
    return prediction_type


def vp_noise_schedule(scheduler: Any) -> VPSchedule:
    """The training noise process of a scheduler: the betas of its configuration, the shift of the
    signal-to-noise ratio and its rescaling to zero included.

    Returns:
        Schedule over `num_train_timesteps` steps; the cumulative product is taken in float64.

    Raises:
        BackboneError: if the configuration describes no discrete variance-preserving process.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        raise BackboneError(
            f"{name} has no beta schedule, so it does not describe the noise this backbone was trained with. Give the "
            "pipeline a DDIMScheduler (or DDPM, PNDM, Euler, DPM-Solver) with the model's own betas."
        )
    fields = {field: config[field] for field in _BETA_FIELDS if field in config}
    try:
        # These classes' tables are those of training whatever the sampler. Not by from_config, which replaces values
        # that are the sampler's own defaults (LCM's betas, say) by DDPMScheduler's, which differ.
        if _SHIFT_FIELD in config:
            shifted: Any = CogVideoXDDIMScheduler(**fields, **{_SHIFT_FIELD: config[_SHIFT_FIELD]})
            return VPSchedule(shifted.alphas_cumprod)
        ddpm: Any = DDPMScheduler(**fields)
        betas = ddpm.betas.to(torch.float64)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise BackboneError(f"The betas of the {name} cannot be computed from its configuration: {error}") from error
    return VPSchedule(torch.cumprod(1.0 - betas, dim=0))
