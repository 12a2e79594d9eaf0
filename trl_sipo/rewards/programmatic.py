# SPDX-License-Identifier: Apache-2.0
"""Rewards without any weights, whose truth can be seen: colour, brightness, sharpness, symmetry, motion.

They are no measures of quality. They are for trying out a pipeline (does brightness rise when it is rewarded?) and for
tests: what they should give for a picture can be said by looking at it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trl_sipo.errors import ConfigurationError, DatasetError, RewardError
from trl_sipo.rewards.base import Media, RewardInfo
from trl_sipo.rewards.colours import pixel_colours
from trl_sipo.rewards.media import check_samples, is_video, to_rgb
from trl_sipo.rewards.requirements import COLOURS
from trl_sipo.rewards.weights import weights_hash

#: Of red, green and blue in brightness (ITU-R BT.601, as Pillow's mode "L").
_LUMA = (0.299, 0.587, 0.114)


class FrameReward(ABC):
    """Scores one image or video at a time, from its frames: an image is one frame.

    Args:
        info: What the scores are; `info.media` says what is taken.
        settings: Whatever else the scores depend on, by name.
        models: All whose weights they depend on.
    """

    def __init__(
        self, info: RewardInfo, *, settings: dict[str, Any] | None = None, models: Sequence[torch.nn.Module] = ()
    ) -> None:
        self.info = info
        self._settings, self._models = settings or {}, tuple(models)

    @abstractmethod
    def score_frames(self, frames: np.ndarray, prompt: str) -> float:
        """The score of uint8 frames (n, height, width, 3), RGB."""

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Tensor:
        """See `trl_sipo.rewards.base.Reward`.

        Raises:
            DatasetError: A medium or a prompt that it cannot score.
            RewardError: A score that is not finite.
        """
        check_samples(media, prompts, name=self.info.name)
        scores = [self._score_one(*sample) for sample in zip(range(len(media)), media, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def identity(self) -> dict[str, Any]:
        """All that a score is a function of, beside the medium and the prompt."""
        return {
            "class": f"{type(self).__module__}:{type(self).__qualname__}",
            "package": import_module("trl_sipo").__version__,
            "settings": self._settings,
            "weights": weights_hash(self._models) if self._models else None,
        }

    def _score_one(self, row: int, medium: Media, prompt: str) -> float:
        kind = "video" if is_video(medium) else "image"
        if kind not in self.info.media:
            raise DatasetError(
                f"{self.info.name}: medium {row} is one {kind}, and it scores {', '.join(self.info.media)}."
            )
        where = f"{self.info.name}, image {row}"
        frames = medium if kind == "video" else np.asarray(to_rgb(medium, where=where))[None]
        score = self.score_frames(frames, prompt)
        if not math.isfinite(score):
            raise RewardError(f"{self.info.name} gave {score} for sample {row} ({prompt!r}).")
        return score


class _Programmatic(FrameReward):
    """One that depends on its name alone."""

    name: str
    convention: str
    higher_is_better = True
    media = frozenset({"image", "video"})

    def __init__(self) -> None:
        super().__init__(RewardInfo(self.name, self.convention, "Apache-2.0", self.higher_is_better, self.media))


class _OfFrames(_Programmatic):
    """The mean over frames of what each of them gives."""

    def score_frames(self, frames: np.ndarray, prompt: str) -> float:
        """See `FrameReward.score_frames`."""
        return fmean(self.score_frame(frame) for frame in frames)

    @abstractmethod
    def score_frame(self, frame: np.ndarray) -> float:
        """Of uint8 (height, width, 3), RGB."""


class Brightness(_OfFrames):
    """How light it is: the mean of luma."""

    name = "brightness"
    convention = "mean luma (BT.601) in [0, 1], mean over frames"

    def score_frame(self, frame: np.ndarray) -> float:
        """In [0, 1]."""
        return float(luma(frame).mean())


class Sharpness(_OfFrames):
    """How much fine detail or noise there is: the variance of the Laplacian of luma, inside the border."""

    name = "sharpness"
    convention = "variance of the 4-neighbour Laplacian of luma in [0, 255], mean over frames"

    def score_frame(self, frame: np.ndarray) -> float:
        """At least 0.

        Raises:
            DatasetError: Fewer than 3 pixels across or down.
        """
        if min(frame.shape[:2]) < 3:
            raise DatasetError(f"{self.name}: {frame.shape[1]}x{frame.shape[0]} pixels have no inside.")
        light = 255 * luma(frame)
        around = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:]
        return float((around - 4 * light[1:-1, 1:-1]).var())


class Symmetry(_OfFrames):
    """How like its mirror image it is, left to right."""

    name = "symmetry"
    convention = "1 - mean |pixel - mirrored pixel|, pixels in [0, 1], mean over frames"

    def score_frame(self, frame: np.ndarray) -> float:
        """In [0, 1]."""
        return 1 - _difference(frame, frame[:, ::-1])


class Motion(_Programmatic):
    """How much changes from frame to frame, whatever moves, flickers or is cut."""

    name = "motion"
    convention = "mean |pixel - same pixel of the frame before|, pixels in [0, 1]"
    media = frozenset({"video"})

    def score_frames(self, frames: np.ndarray, prompt: str) -> float:
        """See `FrameReward.score_frames`.

        Raises:
            DatasetError: One frame alone.
        """
        if len(frames) < 2:
            raise DatasetError(f"{self.name}: a video of one frame has no motion.")
        return fmean(_difference(*pair) for pair in pairwise(frames))


class Flicker(_Programmatic):
    """How much changes back and forth: what moves or fades evenly from frame to frame has little of it.

    A measure of our own, no score of VBench, whose temporal flickering is the mean difference of neighbours.
    """

    name = "flicker"
    convention = "mean |before - 2 * pixel + after| / 2 over inner frames, pixels in [0, 1]; less is steadier"
    higher_is_better = False
    media = frozenset({"video"})

    def score_frames(self, frames: np.ndarray, prompt: str) -> float:
        """In [0, 1]: 1 of black and white frames in turn.

        Raises:
            DatasetError: Fewer than three frames.
        """
        if len(frames) < 3:
            raise DatasetError(f"{self.name}: a video of {len(frames)} frames has none between two others.")
        middles = zip(frames[:-2], frames[1:-1], frames[2:], strict=True)
        return fmean(_bend(*neighbours) for neighbours in middles)


class ColourShare(FrameReward):
    """Share of the pixels of one colour, by the names of `trl_sipo.rewards.colours.pixel_colours`.

    Args:
        colour: One of `trl_sipo.rewards.requirements.COLOURS`; None: the first that the prompt names.

    Raises:
        ConfigurationError: Another colour.
    """

    def __init__(self, colour: str | None = None) -> None:
        if colour is not None and colour not in COLOURS:
            raise ConfigurationError(f"colour={colour!r} is none of {COLOURS}.")
        self.colour = colour
        convention = f"share of pixels that are {colour or 'of the colour that the prompt names'}, over all frames"
        info = RewardInfo("colour_share", convention, "Apache-2.0", media=frozenset({"image", "video"}))
        super().__init__(info, settings={"colour": colour})

    def score_frames(self, frames: np.ndarray, prompt: str) -> float:
        """See `FrameReward.score_frames`.

        Raises:
            DatasetError: No colour is given, and the prompt names none.
        """
        colour = self.colour or next((word for word in prompt.lower().split() if word in COLOURS), None)
        if colour is None:
            raise DatasetError(f"colour_share: the prompt {prompt!r} names none of {COLOURS}; set `colour`.")
        index = COLOURS.index(colour)
        return fmean(float((pixel_colours(Image.fromarray(frame)) == index).mean()) for frame in frames)


def luma(frame: np.ndarray) -> np.ndarray:
    """uint8 (..., 3), RGB -> float64 (...), brightness in [0, 1]."""
    return frame @ np.array(_LUMA) / 255


def _difference(frame: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of uint8 pixels, in [0, 1]."""
    return float(np.abs(frame.astype(np.int16) - other).mean() / 255)


def _bend(before: np.ndarray, frame: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute second difference of uint8 pixels, halved, in [0, 1]."""
    return float(np.abs(before.astype(np.int16) - 2 * frame.astype(np.int16) + after).mean() / (2 * 255))
