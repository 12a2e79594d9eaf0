# SPDX-License-Identifier: Apache-2.0
"""What is logged about a batch of pairs. Names are TRL's where TRL has one; ours are under `sipo/`, `drift/` and
`proximal/`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

# |logit| beyond which the gradient of the log-sigmoid is below one percent of its largest value, on the winning side.
SATURATED_LOGIT = math.log(99.0)


@dataclass(frozen=True)
class PairErrors:
    """Per-image mean squared errors of policy and reference at one noise level; each (batch,) float32.

    `None` is what there is not: a second arm, a reference, or the squared distance of the policy's prediction from the
    reference's, which only the proximal term needs.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor | None = None
    ref_chosen: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None
    chosen_distance: torch.Tensor | None = None
    rejected_distance: torch.Tensor | None = None

    @classmethod
    def of_arms(
        cls,
        policy: Sequence[torch.Tensor],
        reference: Sequence[torch.Tensor],
        distances: Sequence[torch.Tensor] = (),
    ) -> "PairErrors":
        """From the errors of one or two arms, and of the reference on as many or on none; so too the distances."""
        named = {"{}": policy, "ref_{}": reference, "{}_distance": distances}
        return cls(
            **{
                form.format(arm): value
                for form, values in named.items()
                for arm, value in zip(("chosen", "rejected"), values, strict=False)
            }
        )

    def named(self) -> dict[str, torch.Tensor]:
        """By name, those that there are."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}

    @property
    def policy(self) -> tuple[torch.Tensor, ...]:
        """Of the policy on the arms that there are."""
        return tuple(error for error in (self.chosen, self.rejected) if error is not None)

    @property
    def reference(self) -> tuple[torch.Tensor, ...]:
        """Of the reference on the same arms; none where there is no reference."""
        return tuple(error for error in (self.ref_chosen, self.ref_rejected) if error is not None)

    @property
    def distances(self) -> tuple[torch.Tensor, ...]:
        """Of the policy's predictions from the reference's on the same arms; none where they are not needed."""
        return tuple(one for one in (self.chosen_distance, self.rejected_distance) if one is not None)

    @property
    def chosen_logratio(self) -> torch.Tensor:
        """(ref_error - error) / 2 of the chosen images, (batch,)."""
        return (self.ref_chosen - self.chosen) / 2

    @property
    def rejected_logratio(self) -> torch.Tensor:
        """(ref_error - error) / 2 of the rejected images, (batch,)."""
        return (self.ref_rejected - self.rejected) / 2


def pair_statistics(
    errors: PairErrors,
    logit: torch.Tensor,
    log_weight: torch.Tensor,
    weight: torch.Tensor,
    keep: torch.Tensor,
    *,
    beta: float,
    clip_range: float,
) -> dict[str, torch.Tensor]:
    """Statistics of every pair, by the name under which their mean is logged: detached float32 (batch,) tensors.

    Args:
        errors: Of policy and reference.
        logit: beta * (chosen_logratio - rejected_logratio), (batch,).
        log_weight: Log importance weight of the pair, before clipping, (batch,).
        weight: The factor that the objective applies, (batch,).
        keep: Which pairs are not masked, (batch,) bool.
        beta: In the Diffusion-DPO convention.
        clip_range: `sipo/clip_fraction` is the share of weights outside [1 - clip_range, 1 + clip_range].
    """
    statistics = {
        **error_statistics(errors, beta=beta),
        **logit_statistics(logit),
        **weight_statistics(log_weight, weight, keep, clip_range=clip_range),
    }
    return {name: value.detach().float() for name, value in statistics.items()}


def error_statistics(errors: PairErrors, *, beta: float) -> dict[str, torch.Tensor]:
    """What is logged about the errors of pairs, by name: detached float32 (batch,) each. See [`pair_statistics`]."""
    statistics = {
        "rewards/chosen": beta * errors.chosen_logratio,
        "rewards/rejected": beta * errors.rejected_logratio,
        # Up to terms that do not depend on the model, the log-density of a step per latent dimension.
        "logps/chosen": -errors.chosen / 2,
        "logps/rejected": -errors.rejected / 2,
        "drift/chosen_error": errors.chosen / errors.ref_chosen - 1,
        "drift/rejected_error": errors.rejected / errors.ref_rejected - 1,
    }
    return {name: value.detach().float() for name, value in statistics.items()}


def logit_statistics(logit: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is logged about the argument of the log-sigmoid, or sigmoid, of a loss, by name; detached (batch,) each."""
    logit = logit.detach().float()
    return {
        # An exact tie (a fresh model) counts one half.
        "rewards/accuracies": (logit > 0).float() + 0.5 * (logit == 0).float(),
        "rewards/margins": logit,
        "rewards/saturated_fraction": (logit.abs() > SATURATED_LOGIT).float(),
    }


def proximal_statistics(errors: PairErrors, term: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is logged about the proximal term, by name: detached float32 (batch,) each.

    Args:
        errors: With distances.
        term: What the loss has gained, (batch,).
    """
    distance = torch.stack(errors.distances).mean(0)
    return {"proximal/distance": distance.detach().float(), "proximal/loss": term.detach().float()}


def sample_statistics(
    errors: PairErrors, logit: torch.Tensor, is_desirable: torch.Tensor, *, beta: float
) -> dict[str, torch.Tensor]:
    """Statistics of samples of one arm, which are liked or not, by name: detached float32 (batch,) tensors.

    What is about chosen arms is NaN for those that are not liked, and the other way round; no mean counts it.

    Args:
        errors: Of policy and reference.
        logit: The argument of the loss's sigmoid, (batch,).
        is_desirable: (batch,) bool.
        beta: In the Diffusion-DPO convention.
    """
    of_sample = {
        "rewards/{}": beta * errors.chosen_logratio,
        "logps/{}": -errors.chosen / 2,
        "drift/{}_error": errors.chosen / errors.ref_chosen - 1,
    }
    statistics = {
        name.format(arm): torch.where(is_of_arm, value.detach().float(), torch.nan)
        for name, value in of_sample.items()
        for arm, is_of_arm in (("chosen", is_desirable), ("rejected", ~is_desirable))
    }
    return {**statistics, **logit_statistics(logit)}


def weight_statistics(
    log_weight: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor, *, clip_range: float
) -> dict[str, torch.Tensor]:
    """What is logged about the importance weights of pairs, by name; (batch,) each. See [`pair_statistics`]."""
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    return {
        "sipo/importance_weight": log_weight.exp(),
        "sipo/weight": weight,
        "sipo/clip_fraction": ((log_weight < low) | (log_weight > high)).float(),
        "sipo/masked_fraction": 1.0 - keep.float(),
    }
