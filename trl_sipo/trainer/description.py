# SPDX-License-Identifier: Apache-2.0
"""A run in words: what is printed at its start."""

from typing import Any

from torch import nn

from trl_sipo.core.objectives.proximal import BOUNDED_KAPPA, optimal_win_rate
from trl_sipo.trainer.strategy import strategy_in_force


def describe_run(trainer: Any) -> str:
    """Objective, backbone, size, beta with its convention, reference and noise of a trainer."""
    shared = "shared" if trainer.args.share_noise else "separate"
    within = f", {shared} noise within a pair" if trainer.args.arms == "pair" else ""
    return "\n".join(
        [
            f"{trainer.method_name} on {type(trainer.adapter.pipeline).__name__} at "
            f"{describe_media(trainer.size, trainer.args.num_frames)} ({trainer.adapter.prediction_type}, "
            f"{num_trained_parameters(trainer.model):,} trained parameters)",
            f"  {strategy_in_force(trainer.accelerator)}; {_describe_batch(trainer.args)}",
            *([f"  {trainer.beta_description}"] if trainer.beta_description else []),
            f"  reference: {trainer.reference.description}",
            *([f"  {describe_kappa(trainer.args.proximal_kappa)}"] if trainer.args.proximal_kappa else []),
            f"  noise levels: {_describe_levels(trainer)}{within}",
        ]
    )


def describe_kappa(kappa: float) -> str:
    """What kappa means, in one line."""
    if kappa < BOUNDED_KAPPA:
        meaning = f"below {BOUNDED_KAPPA:g}: samples that rarely win are pushed away without an end"
    else:
        meaning = (
            f"an optimum whatever the pairs are; for pairs drawn from the reference it wins up to "
            f"{optimal_win_rate(kappa):.0%} against it"
        )
    return f"proximal term: kappa = {kappa:g} ({meaning})"


def num_trained_parameters(model: nn.Module) -> int:
    """How many numbers are trained, of all processes together."""
    # DeepSpeed ZeRO-3 leaves an empty tensor in the place of a weight that is spread over processes.
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)


def describe_media(size: tuple[int, int], num_frames: int) -> str:
    """Height, width and length of the training media."""
    height, width = size
    pixels = f"{height} px" if height == width else f"{height} x {width} px"
    return pixels if num_frames == 1 else f"{num_frames} frames of {pixels}"


def _describe_batch(args: Any) -> str:
    factors = {"accumulated": args.gradient_accumulation_steps, "processes": args.world_size}
    parts = [f"{args.train_batch_size} per call", *(f"{n} {name}" for name, n in factors.items() if n > 1)]
    pairs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    samples = "pairs" if args.arms == "pair" else "samples"
    return f"{pairs} {samples} per step" + (f" ({' x '.join(parts)})" if len(parts) > 1 else "")


def _describe_levels(trainer: Any) -> str:
    if trainer.args.timesteps is not None:
        return f"timesteps {trainer.args.timesteps}"
    drawn = f"{trainer.args.timestep_sampling} over {trainer.args.timestep_range} of the schedule"
    shift = getattr(trainer.noise_schedule, "drawn_shift", None)  # of flow models
    return drawn if shift is None else f"{drawn} with shift {shift:.4g}"
