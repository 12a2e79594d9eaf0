# SPDX-License-Identifier: Apache-2.0
"""The head that LAION's aesthetic predictor and ImageReward share: from an embedding to one number."""

import torch
from torch import nn

_WIDTHS = (1024, 128, 64, 16, 1)
_DROPOUT_AFTER = 3  # of the first layers


def rating_head(width: int) -> nn.Sequential:
    """Linear layers `width`-1024-128-64-16-1 without activations, with dropouts after the first three.

    All in all an affine map; it keeps the layers and numbers of the published weights. Dropouts do nothing in eval
    mode, in which it is.
    """
    layers: list[nn.Module] = []
    for number, (size, following) in enumerate(zip((width, *_WIDTHS), _WIDTHS, strict=False)):
        layers.append(nn.Linear(size, following))
        if number < _DROPOUT_AFTER:
            layers.append(nn.Dropout())
    return nn.Sequential(*layers).eval()


def head_weights(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a head, from those whose names begin with `prefix`."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
