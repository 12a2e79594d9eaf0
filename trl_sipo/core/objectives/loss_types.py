# SPDX-License-Identifier: Apache-2.0
"""Other losses on the logit of Diffusion-DPO, under the names that TRL's `DPOTrainer` gives them as `loss_type`.

Each is TRL's formula (1.16) with the logit `z = beta * (chosen_logratio - rejected_logratio)` of this package in place
of `beta` times TRL's difference of log-ratios.
"""

from torch import Tensor
from torch.nn.functional import relu

from trl_sipo.core.objectives._preference_nll import check_label_smoothing, preference_nll
from trl_sipo.core.precision import widen


def hinge_loss(logit: Tensor) -> Tensor:
    """`max(0, 1 - z)`: no gradient beyond a logit of 1 (SLiC, Zhao et al., 2023; its loss is this one over beta).

    Args:
        logit: z, `(batch,)`, any floating dtype.

    Returns:
        `(batch,)`, float32 or wider.
    """
    (logit,) = widen(logit)
    return relu(1 - logit)


def ipo_loss(logit: Tensor) -> Tensor:
    """`(z - 1/2)^2`: pulls the logit to 1/2 from both sides (IPO, Azar et al., 2023, Eq. 17, with beta as its tau).

    This is `beta^2` times the paper's and TRL's `(difference of log-ratios - 1 / (2 beta))^2`, which has the same
    minimum. At the betas of diffusion models, in the thousands, that one is so small that the epsilon of Adam would
    swallow its gradient. TRL divides log-ratios by the length of the answer; ours are means over latent dimensions
    already.

    Args:
        logit: z, `(batch,)`, any floating dtype.

    Returns:
        `(batch,)`, float32 or wider.
    """
    (logit,) = widen(logit)
    return (logit - 0.5).square()


def robust_loss(logit: Tensor, *, label_smoothing: float) -> Tensor:
    """`((1 - e) L(z) - e L(-z)) / (1 - 2 e)`, `L(z) = -log sigmoid(z)` (Robust DPO, Chowdhury et al., 2024, Eq. 12).

    Its mean over labels of which the share e is flipped is the mean of L over the true ones. It has no lower bound.

    Args:
        logit: z, `(batch,)`, any floating dtype.
        label_smoothing: e, the share of labels taken to be flipped, in [0, 0.5); 0 is L.

    Returns:
        `(batch,)`, float32 or wider.

    Raises:
        ConfigurationError: a setting out of range.
    """
    check_label_smoothing(label_smoothing)
    share = label_smoothing
    return ((1 - share) * preference_nll(logit) - share * preference_nll(-logit)) / (1 - 2 * share)
