# SPDX-License-Identifier: Apache-2.0
"""The objectives pair by pair, in plain Python floats, straight from the papers' equations."""

import math


def sigmoid(z: float) -> float:
    """1 / (1 + e^-z) without overflow."""
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def preference_nll(z: float, alpha: float = 0.0, label_smoothing: float = 0.0) -> float:
    """-log p + alpha (1 - p), smoothed over the two labels."""

    def one_label(z: float) -> float:
        nll = math.log1p(math.exp(-z)) if z >= 0 else -z + math.log1p(math.exp(z))
        return nll + alpha * (1 - sigmoid(z))

    return (1 - label_smoothing) * one_label(z) + label_smoothing * one_label(-z)


def dpo_cm(z, w_chosen, w_rejected, *, clip_range, mask_threshold, alpha=0.0, label_smoothing=0.0):
    """Eq. 12 and 13 on weights themselves (not their logs): mask, clip, multiply the loss."""
    w = min(w_chosen, w_rejected)
    if w < mask_threshold:
        return 0.0
    clipped = min(max(w, 1 - clip_range), 1 + clip_range)
    return clipped * preference_nll(z, alpha, label_smoothing)


def sipo(z, w_chosen, w_rejected, *, clip_range, mask_threshold, alpha=0.0, label_smoothing=0.0):
    """Eq. 18 and 19 in the paper's order: invert each weight, clip each, take the larger, multiply the logit."""
    if min(w_chosen, w_rejected) < mask_threshold:
        return 0.0
    clipped = [min(max(1 / w, 1 - clip_range), 1 + clip_range) for w in (w_chosen, w_rejected)]
    return preference_nll(max(clipped) * z, alpha, label_smoothing)
