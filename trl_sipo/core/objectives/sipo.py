# SPDX-License-Identifier: Apache-2.0
"""SIPO, stabilized and improved preference optimization (SIPO, Eq. 18 and 19)."""

import torch
from torch import Tensor

from trl_sipo.core.importance import clip_log_weight, pair_log_weight, timestep_mask
from trl_sipo.core.objectives._preference_nll import preference_logit, preference_nll


def masked_scaled_nll(
    logit: Tensor, keep: Tensor, inverse_weight: Tensor, *, alpha: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """`keep * L(inverse_weight * logit)`; the gradient flows through both factors.

    Args:
        logit: z, `(batch,)`.
        keep: `(batch,)` bool; a pair that is not kept has loss and gradient exactly 0, whatever its logit.
        inverse_weight: `(batch,)`, clipped inverse importance weight; detach it before to stop its gradient.
        alpha: weight of the polynomial term, at least -1.
        label_smoothing: in [0, 0.5).

    Returns:
        The unreduced loss `(batch,)`, float32 or wider.
    """
    assert logit.shape == keep.shape == inverse_weight.shape, (logit.shape, keep.shape, inverse_weight.shape)
    # Both factors are replaced before they meet: zeroing only the loss would leave 0 * NaN in the gradient.
    scaled = torch.where(keep, inverse_weight, 1.0) * torch.where(keep, logit, 0.0)
    return torch.where(keep, preference_nll(scaled, alpha=alpha, label_smoothing=label_smoothing), 0.0)


def sipo_loss(
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
    weight_grad: bool = True,
) -> Tensor:
    """`keep * -log sigmoid( clip(1 / w, 1 - clip_range, 1 + clip_range) * z )`, w the smaller weight of the pair.

    The paper's Eq. 18 and 19 multiply the logit by the clipped inverse weight (its A17 divides a second time, against
    A15 and the main text). The mask is that of DPO-C&M. A heuristic: its derivation (A5) weights the reward only.

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
        weight_grad: let the gradient flow through the weight (the paper calls it learnable), where it is not clipped.

    Returns:
        The unreduced loss `(batch,)`, float32 or wider; average it over the full batch, not over the kept pairs.

    Raises:
        ConfigurationError: a setting out of range.
    """
    log_weight = pair_log_weight(chosen_log_weight, rejected_log_weight)
    inverse_weight = clip_log_weight(-log_weight, clip_range).exp()
    if not weight_grad:
        inverse_weight = inverse_weight.detach()
    keep = timestep_mask(log_weight, 1 - clip_range if mask_threshold is None else mask_threshold)
    logit = preference_logit(chosen_logratio, rejected_logratio, beta)
    return masked_scaled_nll(logit, keep, inverse_weight, alpha=alpha, label_smoothing=label_smoothing)
