# SPDX-License-Identifier: Apache-2.0
"""A run in words: what is printed at its start."""

from typing import Any

import torch
from torch import nn

from trl_sipo.core.objectives.proximal import BOUNDED_KAPPA, optimal_win_rate
from trl_sipo.trainer.statistics import PairErrors
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
            *([f"  {describe_kappa(trainer)}"] if trainer.args.proximal_kappa else []),
            f"  noise levels: {_describe_levels(trainer)}{within}",
        ]
    )


def describe_kappa(trainer: Any) -> str:
    """Kappa and what it promises with the loss of this run, in one line.

    Nothing is promised of single images, nor where all of a middle noise level is masked.
    """
    kappa = trainer.args.proximal_kappa
    line = f"proximal term: kappa = {kappa:g}"
    if trainer.args.arms != "pair":
        return line
    pushes = pushes_at_start(trainer)
    needed = float(f"{pushes.max().item():.3g}")
    if needed <= 0:
        return line
    if kappa < needed:
        return f"{line} (below {needed:g}: no optimum is sure, and the smaller beta the farther the policy may go)"
    is_even = bool(pushes.min() > 0.99 * pushes.max())
    loss = "this loss" if is_even else "this loss, its mask and weights taken as they are,"
    # Where samples weigh differently, or are imitated too, or are the steps of a sampler, it is no tilted reference.
    is_tilt = is_even and not trainer.args.sft_weight and not trainer.args.reads_trajectories
    wins = f"wins up to {optimal_win_rate(BOUNDED_KAPPA * kappa / needed):.1%} against it" if is_tilt else ""
    own = "for pairs of two samples of the reference"
    if kappa == needed:
        least = f"the least with which {loss} has an optimum {own}"
        return f"{line} ({least}{wins and f', which {wins}'}; for other pairs take more)"
    return f"{line} (above {needed:g}: {loss} has an optimum whatever the pairs are{wins and f'; {own} it {wins}'})"


def pushes_at_start(trainer: Any) -> torch.Tensor:
    """How hard a loss on pairs pushes rejected samples away at the start, in units of beta / 2: (4096,).

    That is how steeply it falls with the logit: 1/2 where it is the log-sigmoid. Of samples of all errors, since the
    importance weights depend on them, at a middle noise level. Kappa has to be as large as the largest of them.
    """
    ref_error = torch.logspace(-6, 1, 4096, device=trainer.accelerator.device)
    error = ref_error.clone().requires_grad_()
    level = trainer.noise_schedule.level_at(torch.full((4096,), 0.5)).to(ref_error.device)
    loss, _ = trainer.pair_loss(PairErrors.of_arms((ref_error, error), (ref_error, ref_error)), level)
    (slope,) = torch.autograd.grad(loss.sum(), error)
    return -2 * slope / trainer.beta


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
