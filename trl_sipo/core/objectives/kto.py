# SPDX-License-Identifier: Apache-2.0
"""Diffusion-KTO: the utility of images that are liked or not (Li et al., 2024, after KTO, Ethayarajh et al., 2024)."""

import torch
from torch import Tensor

from trl_sipo.core.beta import check_beta
from trl_sipo.core.precision import widen
from trl_sipo.errors import ConfigurationError


def check_weight(weight: float, *, name: str) -> None:
    """Raise ConfigurationError, which calls the setting `name`, unless 0 < weight < inf."""
    if not 0 < weight < float("inf"):
        raise ConfigurationError(
            f"{name}={weight} must be positive and finite. To leave samples out, filter the data."
        )


def reference_point(logratio: Tensor) -> Tensor:
    """`max(0, mean of the log-ratios)`, the estimate of the reference point `Q_ref` from a batch; carries no gradient.

    Args:
        logratio: `(batch,)`, of all samples of the batch, whatever their labels, and of all processes.

    Returns:
        `()`, float32 or wider.
    """
    (logratio,) = widen(logratio)
    return logratio.detach().mean().clamp(min=0)


def kto_logit(logratio: Tensor, is_desirable: Tensor, reference_point: Tensor, *, beta: float) -> Tensor:
    """`beta * (logratio - reference_point)`, with the sign turned for undesirable samples.

    Args:
        logratio: `(batch,)`, `(ref_error - error) / 2`, errors averaged over dims.
        is_desirable: `(batch,)` bool.
        reference_point: `()`, of the same batch.
        beta: positive, Diffusion-DPO convention.

    Returns:
        `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: beta is not positive and finite.
    """
    check_beta(beta)
    assert logratio.ndim == 1 and logratio.shape == is_desirable.shape, (logratio.shape, is_desirable.shape)
    (logratio,) = widen(logratio)
    scaled = beta * (logratio - reference_point)
    return torch.where(is_desirable, scaled, -scaled)


def kto_loss(
    logit: Tensor, is_desirable: Tensor, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """`weight * (1 - sigmoid(logit))`: what is missing from the largest utility, with the paper's sigmoid utility.

    Args:
        logit: `(batch,)`, of `kto_logit`.
        is_desirable: `(batch,)` bool.
        desirable_weight, undesirable_weight: positive; of the two kinds of samples.

    Returns:
        The unreduced loss `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: a setting out of range.
    """
    check_weight(desirable_weight, name="desirable_weight")
    check_weight(undesirable_weight, name="undesirable_weight")
    (logit,) = widen(logit)
    missing = (-logit).sigmoid()
    return torch.where(is_desirable, desirable_weight * missing, undesirable_weight * missing)
