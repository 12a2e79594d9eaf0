# SPDX-License-Identifier: Apache-2.0
"""What a denoiser does on the arms of samples: of pairs in one pass over both, or arm by arm.

The loss depends on each arm through one scalar per pair, its mean squared error. So the arms need not pass the network
together: one after the other gives the same gradient, with the activations of one arm alive at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.parameterization import prediction_error, prediction_target


@dataclass(frozen=True)
class NoisedArm:
    """What the denoiser is given for one arm of the pairs, or for both on top of one another.

    Attributes:
        noisy_latents: (batch, ...) float32.
        target: What the denoiser should have predicted, same shape.
        level: One noise level per sample.
        conditioning: Batched tensors, one row per sample.
        extra: What some backbones are told beside it; tensors have one row per sample.
        anchor: What the reference predicts, same shape; where the distance from it matters.
    """

    noisy_latents: torch.Tensor
    target: torch.Tensor
    level: NoiseLevel
    conditioning: Mapping[str, torch.Tensor]
    extra: Mapping[str, Any]
    anchor: torch.Tensor | None = None


def noised_arm(
    latents: torch.Tensor,
    noise: torch.Tensor,
    level: NoiseLevel,
    conditioning: Mapping[str, torch.Tensor],
    extra: Mapping[str, Any],
    prediction_type: str,
) -> NoisedArm:
    """One arm at its noise level."""
    target = prediction_target(latents, noise, level, prediction_type)
    return NoisedArm(level.add_noise(latents, noise), target, level, conditioning, extra)


def arm_error(adapter: BackboneAdapter, denoiser: torch.nn.Module, arm: NoisedArm) -> torch.Tensor:
    """Mean squared error of the denoiser on each sample of an arm, (batch,) float32."""
    return prediction_error(arm_prediction(adapter, denoiser, arm), arm.target)


def arm_error_and_distance(adapter: BackboneAdapter, denoiser: torch.nn.Module, arm: NoisedArm) -> torch.Tensor:
    """Mean squared error, and mean squared distance from the anchor, of each sample of an arm, (batch, 2) float32."""
    prediction = arm_prediction(adapter, denoiser, arm)
    return torch.stack([prediction_error(prediction, arm.target), prediction_error(prediction, arm.anchor)], dim=1)


def arm_prediction(adapter: BackboneAdapter, denoiser: torch.nn.Module, arm: NoisedArm) -> torch.Tensor:
    """What the denoiser predicts for each sample of an arm, (batch, ...) of its dtype."""
    return adapter.forward(denoiser, arm.noisy_latents, arm.level, arm.conditioning, arm.extra)


def arm_errors(
    adapter: BackboneAdapter,
    denoiser: torch.nn.Module,
    *arms: NoisedArm,
    split: bool = False,
    measure: Callable[[BackboneAdapter, torch.nn.Module, NoisedArm], torch.Tensor] = arm_error,
) -> tuple[torch.Tensor, ...]:
    """Mean squared errors of each arm, (batch,) float32, or what else is measured, (batch, ...).

    Args:
        arms: One, or the chosen and the rejected one.
        measure: Of one arm; its first dimension is the batch.
        split: Keep the activations of one arm at a time: those of the chosen arm are computed again in the backward
            pass, after that of the rejected one. One forward pass of one arm more, for about half the activations.

    Arms of different shapes pass the denoiser one after the other in any case.
    """
    if len(arms) == 1:
        return (measure(adapter, denoiser, *arms),)
    chosen, rejected = arms
    if not split and chosen.noisy_latents.shape == rejected.noisy_latents.shape:
        return measure(adapter, denoiser, _on_top_of_one_another(chosen, rejected)).chunk(2)
    if not split or not torch.is_grad_enabled():
        return measure(adapter, denoiser, chosen), measure(adapter, denoiser, rejected)
    # The chosen arm first: autograd goes backward through what came last, and so has freed the activations of the
    # rejected arm when it comes to recompute those of the chosen one.
    of_chosen = checkpoint(measure, adapter, denoiser, chosen, use_reentrant=False)
    return of_chosen, measure(adapter, denoiser, rejected)


def _on_top_of_one_another(chosen: NoisedArm, rejected: NoisedArm) -> NoisedArm:
    return NoisedArm(
        torch.cat([chosen.noisy_latents, rejected.noisy_latents]),
        torch.cat([chosen.target, rejected.target]),
        chosen.level.repeat_pair(),
        {name: torch.cat([value, rejected.conditioning[name]]) for name, value in chosen.conditioning.items()},
        {name: _joined(value, rejected.extra[name]) for name, value in chosen.extra.items()},
        None if chosen.anchor is None else torch.cat([chosen.anchor, rejected.anchor]),
    )


def _joined(chosen: Any, rejected: Any) -> Any:
    return torch.cat([chosen, rejected]) if isinstance(chosen, torch.Tensor) else chosen
