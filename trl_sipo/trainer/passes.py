# SPDX-License-Identifier: Apache-2.0
"""The passes of a step: of the reference, first and without a gradient, and of the policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from trl_sipo.core.parameterization import prediction_error
from trl_sipo.core.transfer import to_device
from trl_sipo.trainer.arms import NoisedArm, arm_error, arm_error_and_distance, arm_errors, arm_prediction
from trl_sipo.trainer.statistics import PairErrors


def errors_of(
    trainer: Any, model: torch.nn.Module, arms: Sequence[NoisedArm], ref_errors: Sequence[torch.Tensor] | None
) -> PairErrors:
    """The errors of reference, if there is one, and policy.

    Args:
        trainer: A diffusion preference trainer.
        model: The policy, as the trainer wraps it.
        arms: Of the pairs, at their noise levels.
        ref_errors: (batch,) each, where they are known; `None`: the reference is asked.
    """
    if ref_errors is None:
        ref_errors = of_reference(trainer, arms, arm_error) if trainer.args.has_reference else ()
    with trainer.accelerator.autocast():
        errors = arm_errors(trainer.predictor, model, *arms, split=trainer.args.split_pair_backward)
    return PairErrors.of_arms(errors, [to_device(error, errors[0].device) for error in ref_errors])


def errors_and_distances_of(
    trainer: Any,
    model: torch.nn.Module,
    arms: Sequence[NoisedArm],
    ref_errors: Sequence[torch.Tensor] | None,
    ref_predictions: Sequence[torch.Tensor] | None,
) -> PairErrors:
    """The same, with the distances of the policy's predictions from the reference's.

    Args:
        trainer, model, arms: As of [`errors_of`].
        ref_errors: (batch,) each, where they are known, and with them the predictions.
        ref_predictions: Of the shape of the arms' targets, where they are known; `None`: the reference is asked.
    """
    if ref_predictions is None:
        ref_errors, ref_predictions = None, of_reference(trainer, arms, arm_prediction)
    anchors = [to_device(prediction, arms[0].target.device) for prediction in ref_predictions]
    anchored = [replace(arm, anchor=anchor) for arm, anchor in zip(arms, anchors, strict=True)]
    options = {"split": trainer.args.split_pair_backward, "measure": arm_error_and_distance}
    with trainer.accelerator.autocast():
        found = arm_errors(trainer.predictor, model, *anchored, **options)
    errors, distances = zip(*(arm.unbind(dim=1) for arm in found), strict=True)
    if ref_errors is None:
        ref_errors = [prediction_error(arm.anchor, arm.target) for arm in anchored]
    return PairErrors.of_arms(errors, [to_device(error, errors[0].device) for error in ref_errors], distances)


def of_reference(
    trainer: Any, arms: Sequence[NoisedArm], measure: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """What is measured of the reference on each arm, as of [`~trl_sipo.trainer.arms.arm_errors`]."""
    # Both under autocast of our own: before training, only one of the two may have been prepared for it. One block
    # each, since a cast of a weight that is cached without a gradient must not reach the policy.
    with (
        torch.no_grad(),
        trainer.accelerator.autocast(),
        trainer.reference.active(trainer.model, trainer.unwrapped_model) as ref_model,
    ):
        return arm_errors(trainer.predictor, ref_model, *arms, measure=measure)
