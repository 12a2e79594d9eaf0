# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DPO (Wallace et al., 2023, Eq. 14)."""

from torch import Tensor

from trl_sipo.core.objectives._preference_nll import preference_logit, preference_nll


def diffusion_dpo_loss(
    chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """`-log sigmoid(z)`, `z = beta * (chosen_logratio - rejected_logratio)`.

    Args:
        chosen_logratio: `(batch,)`, `(ref_error - error) / 2` of the chosen sample, errors averaged over dims.
        rejected_logratio: `(batch,)`, of the rejected one.
        beta: positive; 2000 to 5000 for Stable Diffusion.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Returns:
        The unreduced loss `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: a setting out of range.
    """
    return preference_nll(preference_logit(chosen_logratio, rejected_logratio, beta), label_smoothing=label_smoothing)
