# SPDX-License-Identifier: Apache-2.0
"""A run in words: what is printed at its start."""

from typing import Any

from trl_sipo.core.beta import describe_beta


def describe_run(trainer: Any) -> str:
    """Objective, backbone, size, beta with its convention, reference and noise of a trainer."""
    shared = "shared" if trainer.args.share_noise else "separate"
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return "\n".join(
        [
            f"{trainer.method_name} on {type(trainer.adapter.pipeline).__name__} at "
            f"{describe_media(trainer.size, trainer.args.num_frames)} ({trainer.adapter.prediction_type}, "
            f"{trained:,} trained parameters)",
            f"  {describe_beta(trainer.beta)}",
            f"  reference: {trainer.reference.description}",
            f"  noise levels: {_describe_levels(trainer)}, {shared} noise within a pair",
        ]
    )


def describe_media(size: tuple[int, int], num_frames: int) -> str:
    """Height, width and length of the training media."""
    height, width = size
    pixels = f"{height} px" if height == width else f"{height} x {width} px"
    return pixels if num_frames == 1 else f"{num_frames} frames of {pixels}"


def _describe_levels(trainer: Any) -> str:
    if trainer.args.timesteps is not None:
        return f"timesteps {trainer.args.timesteps}"
    drawn = f"{trainer.args.timestep_sampling} over {trainer.args.timestep_range} of the schedule"
    shift = getattr(trainer.noise_schedule, "drawn_shift", None)  # of flow models
    return drawn if shift is None else f"{drawn} with shift {shift:.4g}"
