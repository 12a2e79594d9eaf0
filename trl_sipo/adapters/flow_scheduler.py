# SPDX-License-Identifier: Apache-2.0
"""What the rectified-flow backbones read from a scheduler's configuration.

Only the configuration is read, never the scheduler's state: `sigmas` holds those of the last inference, some samplers
hold variance-exploding ones until then, and `set_timesteps` applies a static shift a second time.
"""

import math
from typing import Any

from trl_sipo.core.noise_schedule import FlowSchedule
from trl_sipo.errors import BackboneError

# (mu) -> the shift of `FlowSchedule`, which both forms are: exp(mu) / (exp(mu) + 1 / t - 1), and mu in its place.
_DYNAMIC_SHIFTS = {"exponential": math.exp, "linear": float}


def check_flow_scheduler(scheduler: Any) -> None:
    """Raise [`BackboneError`] unless the scheduler's configuration is one of rectified flow."""
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = "beta_schedule" not in config or config.get("use_flow_sigmas", False)
    if not is_flow:
        raise BackboneError(
            f"The {name} has a beta schedule and no use_flow_sigmas=True, but this backbone is trained by flow "
            "matching. Give the pipeline a FlowMatchEulerDiscreteScheduler, or the scheduler of its own repository."
        )
    prediction_type = config.get("prediction_type", "flow_prediction")
    if prediction_type != "flow_prediction":
        raise BackboneError(
            f"The {name} has prediction_type={prediction_type!r}; this backbone predicts the flow. Set it with "
            "`pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, "
            "prediction_type='flow_prediction')`."
        )
    if config.get("invert_sigmas"):
        raise BackboneError(
            f"The {name} has invert_sigmas=True: its time runs from noise 0 to 1, which no backbone here does."
        )


def uses_dynamic_shifting(scheduler: Any) -> bool:
    """Whether the shift depends on the size of what is drawn, by a `mu` that the pipeline computes."""
    return bool(scheduler.config.get("use_dynamic_shifting"))


def check_static_shift(pipeline: Any, shift: str) -> None:
    """Raise [`BackboneError`] for a scheduler that shifts by the size, in a pipeline that computes no `mu` for it.

    Args:
        shift: the static shift to set instead, in words.
    """
    if uses_dynamic_shifting(pipeline.scheduler):
        raise BackboneError(
            f"The scheduler has use_dynamic_shifting=True, but {type(pipeline).__name__} computes no shift for it. "
            f"Set use_dynamic_shifting=False and {shift}."
        )


def linear_mu(scheduler: Any, sequence_length: int) -> float:
    """The `mu` of dynamic shifting, linear in the number of latent tokens.

    From `base_shift` at `base_image_seq_len` tokens to `max_shift` at `max_image_seq_len`, and on along that line.
    """
    defaults = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    low, high, first, last = (scheduler.config.get(name, value) for name, value in defaults.items())
    slope = (high - low) / (last - first)
    return low + slope * (sequence_length - first)


def flow_noise_schedule(scheduler: Any, *, timestep_scale: float, mu: float | None = None) -> FlowSchedule:
    """The noise process of a flow scheduler, with the shift that inference applies.

    Its grid, by which importance weights find a level's neighbour, is the plain one, uniform before the shift, also of
    a scheduler with `use_karras_sigmas`, `use_exponential_sigmas` or `use_beta_sigmas`: these are other steps through
    the same process, which users choose for sampling, so that they are no reason to refuse a pipeline.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler, or a UniPC, DPM-Solver, ... with `use_flow_sigmas`.
        timestep_scale: what the pipeline multiplies sigma by before it gives it to the denoiser.
        mu: of dynamic shifting, as the pipeline computes it for one size; unused where shifting is static.

    Raises:
        BackboneError: the configuration is not one of rectified flow, or shifts dynamically in an unknown form.
    """
    check_flow_scheduler(scheduler)
    config = scheduler.config
    shift = config.get("flow_shift", 1.0) if config.get("use_flow_sigmas") else config.get("shift", 1.0)
    if uses_dynamic_shifting(scheduler):
        form = config.get("time_shift_type", "exponential")
        if form not in _DYNAMIC_SHIFTS:
            raise BackboneError(
                f"The {type(scheduler).__name__} has time_shift_type={form!r}; known are {sorted(_DYNAMIC_SHIFTS)}."
            )
        assert mu is not None, "a backbone whose scheduler may shift dynamically computes mu"
        shift = _DYNAMIC_SHIFTS[form](mu)
    # 0 and None both mean "not stretched" to diffusers.
    return FlowSchedule(shift, timestep_scale, shift_terminal=config.get("shift_terminal") or None)
