# SPDX-License-Identifier: Apache-2.0
"""Poly-DPO: Diffusion-DPO with one polynomial term of its loss reweighted, after PolyLoss (Leng et al., 2022)."""

from torch import Tensor

from trl_sipo.core.objectives._preference_nll import preference_logit, preference_nll


def poly_dpo_loss(
    chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float, alpha: float, label_smoothing: float = 0.0
) -> Tensor:
    """`-log p + alpha * (1 - p)` with `p = sigmoid(z)`; its derivative in z is `-(1 - p) * (1 + alpha * p)`.

    Args:
        chosen_logratio: `(batch,)`, `(ref_error - error) / 2` of the chosen sample, errors averaged over dims.
        rejected_logratio: `(batch,)`, of the rejected one.
        beta: positive, Diffusion-DPO convention.
        alpha: at least -1. Positive for noisy labels, negative for labels that are too easy; 0 is Diffusion-DPO.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        The unreduced loss `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: a setting out of range.
    """
    logit = preference_logit(chosen_logratio, rejected_logratio, beta)
    return preference_nll(logit, alpha=alpha, label_smoothing=label_smoothing)
