# SPDX-License-Identifier: Apache-2.0
"""DPO-C&M, Diffusion-DPO with clipping and masking (SIPO, Eq. 12 and 13)."""

import torch
from torch import Tensor

from trl_sipo.core.importance import clip_log_weight, pair_log_weight, timestep_mask
from trl_sipo.core.objectives._preference_nll import preference_logit, preference_nll


def masked_weighted_nll(
    logit: Tensor, keep: Tensor, weight: Tensor, *, alpha: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """`keep * weight * L(logit)`, the weight without gradient.

    Args:
        logit: z, `(batch,)`.
        keep: `(batch,)` bool; a pair that is not kept has loss and gradient exactly 0, whatever its logit.
        weight: `(batch,)`, clipped importance weight; detached here.
        alpha: weight of the polynomial term, at least -1.
        label_smoothing: in [0, 0.5).

    Returns:
        The unreduced loss `(batch,)`, float32 or wider.
    """
    assert logit.shape == keep.shape == weight.shape, (logit.shape, keep.shape, weight.shape)
    # The logit goes first: zeroing only the loss would leave 0 * NaN in the gradient of a huge error.
    loss = preference_nll(torch.where(keep, logit, 0.0), alpha=alpha, label_smoothing=label_smoothing)
    return torch.where(keep, weight.detach() * loss, 0.0)


def dpo_cm_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    chosen_log_weight: Tensor,
    rejected_log_weight: Tensor,
    *,
    beta: float,
    clip_range: float,
    mask_threshold: float | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`keep * clip(w, 1 - clip_range, 1 + clip_range) * -log sigmoid(z)`, w the smaller weight of the pair.

    The weight carries no gradient: otherwise the loss would reward a policy for raising its error.

    Args:
        chosen_logratio: `(batch,)`, `(ref_error - error) / 2` of the chosen sample, errors averaged over dims.
        rejected_logratio: `(batch,)`, of the rejected one.
        chosen_log_weight: `(batch,)`, log w of the chosen sample (`importance.log_importance_weight`).
        rejected_log_weight: `(batch,)`, of the rejected one.
        beta: positive, Diffusion-DPO convention.
        clip_range: strictly between 0 and 1.
        mask_threshold: pairs with w below it are dropped; None means `1 - clip_range`, 0.0 switches the mask off.
        alpha: weight of Poly-DPO's term, at least -1.
        label_smoothing: in [0, 0.5).

    Returns:
        The unreduced loss `(batch,)`, float32 or wider; average it over the full batch, not over the kept pairs.

    Raises:
        ConfigurationError: a setting out of range.
    """
    log_weight = pair_log_weight(chosen_log_weight, rejected_log_weight)
    weight = clip_log_weight(log_weight, clip_range).exp()
    keep = timestep_mask(log_weight, 1 - clip_range if mask_threshold is None else mask_threshold)
    logit = preference_logit(chosen_logratio, rejected_logratio, beta)
    return masked_weighted_nll(logit, keep, weight, alpha=alpha, label_smoothing=label_smoothing)
