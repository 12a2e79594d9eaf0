# SPDX-License-Identifier: Apache-2.0
"""The part all objectives share: the preference logit, and the negative log-likelihood of preferring the chosen."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_sipo.core.beta import check_beta
from trl_sipo.core.precision import widen
from trl_sipo.errors import ConfigurationError


def check_alpha(alpha: float, *, name: str = "alpha") -> None:
    """Raise ConfigurationError, which calls the setting `name`, unless -1 <= alpha < inf."""
    if not -1 <= alpha < float("inf"):
        raise ConfigurationError(
            f"{name}={alpha} must be finite and at least -1: below -1 the polynomial term turns the gradient against "
            "the chosen sample. Positive values are for noisy labels, negative ones for over-simple data, 0 is plain "
            "DPO."
        )


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise ConfigurationError unless 0 <= label_smoothing < 0.5."""
    if not 0 <= label_smoothing < 0.5:
        raise ConfigurationError(
            f"label_smoothing={label_smoothing} must lie in [0, 0.5): it is the share of labels taken to be flipped."
        )


def check_loss_settings(alpha: float, label_smoothing: float) -> None:
    """Raise ConfigurationError unless -1 <= alpha < inf and 0 <= label_smoothing < 0.5."""
    check_alpha(alpha)
    check_label_smoothing(label_smoothing)


def preference_logit(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float) -> Tensor:
    """`z = beta * (chosen_logratio - rejected_logratio)`.

    Args:
        chosen_logratio: `(batch,)`, `(ref_error - error) / 2` of the chosen sample.
        rejected_logratio: `(batch,)`, of the rejected one.
        beta: positive, Diffusion-DPO convention.

    Returns:
        `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: beta is not positive and finite.
    """
    check_beta(beta)
    assert chosen_logratio.ndim == 1 and chosen_logratio.shape == rejected_logratio.shape, "need (batch,) twice"
    chosen_logratio, rejected_logratio = widen(chosen_logratio, rejected_logratio)
    return beta * (chosen_logratio - rejected_logratio)


def preference_nll(logit: Tensor, *, alpha: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """`L(z) = -log sigmoid(z) + alpha * sigmoid(-z)`, smoothed to `(1 - e) L(z) + e L(-z)`.

    Args:
        logit: z, `(batch,)`, any floating dtype.
        alpha: weight of Poly-DPO's polynomial term, at least -1; exactly 0 leaves plain DPO, to the bit.
        label_smoothing: e of conservative DPO, in [0, 0.5); exactly 0 leaves L, to the bit.

    Returns:
        `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: a setting out of range.
    """
    check_loss_settings(alpha, label_smoothing)
    (logit,) = widen(logit)
    loss = _polynomial_nll(logit, alpha)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss + label_smoothing * _polynomial_nll(-logit, alpha)


def _polynomial_nll(logit: Tensor, alpha: float) -> Tensor:
    nll = -logsigmoid(logit)
    return nll if alpha == 0 else nll + alpha * (-logit).sigmoid()
