# SPDX-License-Identifier: Apache-2.0
"""Labels that are probabilities (votes, confidences), for every objective whose loss is a function of the logit."""

from collections.abc import Callable

import torch
from torch import Tensor


def soft_label_loss(loss: Callable[[Tensor], Tensor], logit: Tensor, label: Tensor) -> Tensor:
    """`label * loss(z) + (1 - label) * loss(-z)`: the expected loss when the chosen arm is preferred so often.

    The conservative form of DPO: label smoothing with a share of its own for each pair. The two compose: a loss that
    is smoothed by e sees the label `p (1 - 2 e) + e`. Importance weights and masks take the arms alike, so they stay
    as they are when the arms are exchanged.

    Args:
        loss: from a logit `(batch,)` to the unreduced loss `(batch,)`.
        logit: z, `(batch,)`.
        label: `(batch,)` in [0, 1], the probability that the chosen arm is preferred; exactly 1 leaves loss and
            gradient, to the bit.

    Returns:
        The unreduced loss `(batch,)`.
    """
    assert logit.shape == label.shape, (logit.shape, label.shape)
    label = label.to(logit)
    # A side without weight gets a logit of 0: the loss of a huge one may be infinite, and 0 * inf is NaN.
    preferred = loss(torch.where(label > 0, logit, 0.0))
    dispreferred = loss(torch.where(label < 1, -logit, 0.0))
    return label * preferred + (1 - label) * dispreferred
