# SPDX-License-Identifier: Apache-2.0
"""Rewards whose scores anybody can compute: how red a picture is, and how dark."""

import numpy as np
import torch

from trl_sipo.rewards.base import RewardInfo


class _MeanColour:
    def __init__(self, name, of_pixels, higher_is_better=True):
        self.info = RewardInfo(
            name, "mean over pixels", "none needed", higher_is_better, frozenset({"image", "video"})
        )
        self._of_pixels = of_pixels

    def score(self, media, prompts):
        """One number per sample."""
        return torch.tensor([float(self._of_pixels(np.asarray(medium) / 255.0)) for medium in media])


class _Known(_MeanColour):
    def identity(self):
        """All that the scores are a function of."""
        return {"version": 1}


def redness():
    """Red minus the mean of the others; its scores can be cached."""
    return _Known("redness", lambda pixels: pixels[..., 0].mean() - pixels[..., 1:].mean())


def brightness():
    """Mean of all channels, less is better."""
    return _MeanColour("brightness", lambda pixels: pixels.mean(), higher_is_better=False)
