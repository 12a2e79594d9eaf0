# SPDX-License-Identifier: Apache-2.0
"""The importance weight as a function of the noise level (Fig. 4 of the SIPO paper), by forward passes only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.importance import log_importance_weight, pair_log_weight
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
from trl_sipo.core.transition import rho_squared
from trl_sipo.trainer.arms import arm_error, noised_arm
from trl_sipo.trainer.encoding import EncodedPairs


@dataclass(frozen=True)
class PairWeights:
    """Errors and log importance weights of pairs at several noise levels.

    Attributes:
        chosen_error, rejected_error: (levels, pairs) float32, mean squared error in the denoiser's output space.
        chosen, rejected: (levels, pairs) float32, log weights.
    """

    chosen_error: Tensor
    rejected_error: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def pair(self) -> Tensor:
        """The log weights that a pair shares, (levels, pairs)."""
        return pair_log_weight(self.chosen, self.rejected)

    @staticmethod
    def join(parts: Sequence["PairWeights"]) -> "PairWeights":
        """The same levels for the pairs of all parts."""
        names = PairWeights.__dataclass_fields__
        return PairWeights(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))


@torch.no_grad()
def errors_at_levels(
    adapter: BackboneAdapter,
    denoiser: torch.nn.Module,
    clean_latents: Tensor,
    noise: Tensor,
    conditioning: Mapping[str, Tensor],
    levels: NoiseLevel,
    *,
    extra: Mapping[str, Any] | None = None,
    on_level: Callable[[], object] = lambda: None,
) -> Tensor:
    """The denoiser's error on each sample at each noise level, one forward pass a level.

    Args:
        adapter: The backbone.
        denoiser: The model that is measured; it is run in eval mode and comes back in the mode it had.
        clean_latents: (n, ...) float32, normalised.
        noise: (n, ...) float32, shared by all levels.
        conditioning: Batched tensors for the denoiser.
        levels: (levels,).
        extra: What some backbones are told beside the prompt, as for the adapter's `forward`.
        on_level: Called after each level, for a progress bar.

    Returns:
        (levels, n) float32 on the CPU.
    """
    device, count = clean_latents.device, len(clean_latents)
    was_training = denoiser.training
    denoiser.eval()
    errors = []
    for alpha_t, sigma_t, timestep in zip(levels.alpha_t, levels.sigma_t, levels.timestep, strict=True):
        level = NoiseLevel(alpha_t.expand(count), sigma_t.expand(count), timestep.expand(count)).to(device)
        arm = noised_arm(clean_latents, noise, level, conditioning, extra or {}, adapter.prediction_type)
        errors.append(arm_error(adapter, denoiser, arm).float().cpu())
        on_level()
    denoiser.train(was_training)
    return torch.stack(errors)


def log_weights(
    errors: Tensor, levels: NoiseLevel, schedule: VPSchedule | FlowSchedule, prediction_type: str, num_steps: int
) -> Tensor:
    """log w of errors (levels, n) on the CPU, with the neighbours of a sampler grid of `num_steps`."""
    levels = levels.to("cpu")
    rho = rho_squared(levels, schedule.previous_level(levels, num_steps), prediction_type)
    return log_importance_weight(errors, rho[:, None].expand_as(errors))


def importance_weight_curve(
    adapter: BackboneAdapter,
    denoiser: torch.nn.Module,
    clean_latents: Tensor,
    prompts: Sequence[str],
    levels: NoiseLevel,
    *,
    schedule: VPSchedule | FlowSchedule | None = None,
    num_steps: int = 50,
    seed: int = 0,
) -> list[float]:
    """Mean over samples of w(t) = p_theta(x_s | x_t) / q(x_s | x_t, x_0), at each noise level.

    Args:
        adapter: The backbone.
        denoiser: The model that is measured.
        clean_latents: (n, ...) float32, normalised.
        prompts: One per sample.
        levels: (levels,), of the schedule's `level` or `level_at`.
        schedule: Gives the neighbour s of t; the adapter's, at its default size, if not given.
        num_steps: Steps of the sampler grid that defines the neighbour.
        seed: Of the noise, one draw per sample, shared by all levels.

    Returns:
        One mean weight per level, in [0, 1].
    """
    schedule = schedule or adapter.noise_schedule
    conditioning = adapter.collate(adapter.encode_prompts(list(prompts)))
    noise = torch.randn(clean_latents.shape, generator=torch.Generator().manual_seed(seed)).to(clean_latents.device)
    errors = errors_at_levels(adapter, denoiser, clean_latents, noise, conditioning, levels)
    return log_weights(errors, levels, schedule, adapter.prediction_type, num_steps).exp().mean(1).tolist()


def pair_weights(
    adapter: BackboneAdapter,
    denoiser: torch.nn.Module,
    pairs: EncodedPairs,
    noise: Tensor,
    levels: NoiseLevel,
    *,
    schedule: VPSchedule | FlowSchedule,
    num_steps: int = 50,
    on_level: Callable[[], object] = lambda: None,
) -> PairWeights:
    """Errors and log weights of pairs at each noise level, both arms in one forward pass as in training.

    Args:
        adapter: The backbone.
        denoiser: The model that is measured.
        pairs: A batch.
        noise: (pairs, ...) float32, shared by both arms and all levels.
        levels: (levels,).
        schedule: Gives the neighbour s of each level.
        num_steps: Steps of the sampler grid that defines the neighbour.
        on_level: Called after each level, for a progress bar.
    """
    rate = pairs.pair_frame_rate
    errors = errors_at_levels(
        adapter,
        denoiser,
        pairs.latents,
        torch.cat([noise, noise]),
        pairs.pair_conditioning,
        levels,
        extra=None if rate is None else {"frame_rate": rate},
        on_level=on_level,
    )
    log_weight = log_weights(errors, levels, schedule, adapter.prediction_type, num_steps)
    return PairWeights(*errors.chunk(2, dim=1), *log_weight.chunk(2, dim=1))


def stratum_midpoints(count: int) -> Tensor:
    """Times in the middle of `count` equal strata of [0, 1], (count,) float64: a mean over them is one over [0, 1]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def masked_regions(
    times: Sequence[float],
    weights: Sequence[float],
    mask_threshold: float,
    *,
    within: tuple[float, float] = (0.0, 1.0),
) -> list[tuple[float, float]]:
    """Where a curve of weights lies below the threshold, as intervals of time.

    Between two times the curve is taken for a straight line; before the first and after the last for constant, up to
    the ends of what was measured.

    Args:
        times: Increasing, within the ends.
        weights: One per time.
        mask_threshold: A weight below it is masked.
        within: The ends of the part of the schedule that was measured.

    Returns:
        (start, end) of each region, in order; none if nothing is masked, or nothing was measured.
    """
    is_masked = [weight < mask_threshold for weight in weights]
    edges = [within[0]] if is_masked[:1] == [True] else []
    for i in range(1, len(weights)):
        if is_masked[i] != is_masked[i - 1]:
            part = (mask_threshold - weights[i - 1]) / (weights[i] - weights[i - 1])
            edges.append(times[i - 1] + part * (times[i] - times[i - 1]))
    if is_masked[-1:] == [True]:
        edges.append(within[1])
    return list(zip(edges[::2], edges[1::2], strict=True))
