# SPDX-License-Identifier: Apache-2.0
"""The demo's judges as rewards: does a picture, or a clip, show the garment asked for, in its colour?

"fashion" is the primary judge, by which pairs are ranked; "fashion-second" the second one, that no training saw.
`measure="correct"` scores by 1 and 0 ("fashion-correct", "fashion-second-correct"). "moving-fashion" and its like
judge clips.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trl_sipo.demo.fashion import IMAGE_SIZE, all_prompts
from trl_sipo.demo.sampling import prompt_ids
from trl_sipo.demo.verifier import TRUNKS, Verifier, load_verifiers
from trl_sipo.demo.video.model import VIDEO_ASSETS
from trl_sipo.demo.video.sprites import all_video_prompts
from trl_sipo.demo.video.sprites import prompt_ids as video_prompt_ids
from trl_sipo.demo.video.verifier import judge_clips
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.rewards.base import RewardInfo
from trl_sipo.rewards.batched import BatchedReward
from trl_sipo.rewards.programmatic import FrameReward

LICENCE = "Apache-2.0 (weights and code), MIT (Fashion-MNIST)"
_CONVENTIONS = {
    "log_prob": "log p({attributes} | {medium}), nats, at most 0",
    "correct": "1 if {attributes} are right, else 0",
}


class FashionReward(BatchedReward):
    """How sure a judge is of the class and the colour that the prompt names; see `trl_sipo.demo.verifier`.

    Args:
        judge: "primary" or "second".
        measure: "log_prob", in nats and at most 0; or "correct", 1 or 0.
        batch_size: Pictures at once.

    Raises:
        ConfigurationError: Another judge or measure.
    """

    def __init__(self, judge: str = "primary", *, measure: str = "log_prob", batch_size: int = 256) -> None:
        info = _info("fashion", judge, measure, medium="image", attributes="class and colour")
        self.verifier, self.measure = _judges(None)[judge], measure
        super().__init__(info, models=[self.verifier], settings={"measure": measure}, batch_size=batch_size)

    def score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """See `BatchedReward.score_images`.

        Raises:
            DatasetError: An image that is not 32x32, or a prompt that is not of the demo.
        """
        asked = [_known_prompt(prompt, _prompts()) for prompt in prompts]
        pixels = torch.stack([_pixels(np.array(image)) for image in images])
        judged = self.verifier.scores(pixels, *prompt_ids(asked))
        return judged["log_prob" if self.measure == "log_prob" else "both_correct"].float()


class MovingFashionReward(FrameReward):
    """How sure a judge is of the class, the colour and the direction that the prompt names, of clips.

    Args:
        judge, measure: See `FashionReward`.

    Raises:
        ConfigurationError: Another judge or measure.
    """

    def __init__(self, judge: str = "primary", *, measure: str = "log_prob") -> None:
        info = _info("moving-fashion", judge, measure, medium="video", attributes="class, colour and direction")
        self.verifier, self.measure = _judges(VIDEO_ASSETS / "verifier")[judge], measure
        super().__init__(info, models=[self.verifier], settings={"measure": measure})

    def score_frames(self, frames: np.ndarray, prompt: str) -> float:
        """See `FrameReward.score_frames`.

        Raises:
            DatasetError: Frames that are not 32x32, or fewer than two; or a prompt that is not of the demo.
        """
        asked = _known_prompt(prompt, _video_prompts())
        if len(frames) < 2:
            raise DatasetError(f"{self.info.name}: in a video of one frame nothing moves.")
        clip = torch.stack([_pixels(frame) for frame in frames], dim=1)[None]
        judged = judge_clips(self.verifier, clip, video_prompt_ids([asked]))
        return judged["log_prob" if self.measure == "log_prob" else "correct"].item()


fashion_second = functools.partial(FashionReward, "second")
fashion_correct = functools.partial(FashionReward, measure="correct")
fashion_second_correct = functools.partial(FashionReward, "second", measure="correct")
moving_fashion_second = functools.partial(MovingFashionReward, "second")
moving_fashion_correct = functools.partial(MovingFashionReward, measure="correct")
moving_fashion_second_correct = functools.partial(MovingFashionReward, "second", measure="correct")


def _info(name: str, judge: str, measure: str, *, medium: str, attributes: str) -> RewardInfo:
    if judge not in TRUNKS or measure not in _CONVENTIONS:
        raise ConfigurationError(
            f"judge={judge!r}, measure={measure!r}: the judges are {', '.join(TRUNKS)}, the measures "
            f"{', '.join(_CONVENTIONS)}."
        )
    parts = [name, *(["second"] if judge == "second" else []), *(["correct"] if measure == "correct" else [])]
    convention = _CONVENTIONS[measure].format(attributes=attributes, medium=medium)
    return RewardInfo("-".join(parts), f"{convention} ({judge} judge of the demo)", LICENCE, media=frozenset({medium}))


def _judges(directory: Any) -> dict[str, Verifier]:
    return dict(zip(TRUNKS, load_verifiers(directory), strict=True))


@functools.cache
def _prompts() -> dict[str, Any]:
    return {prompt.text: prompt for prompt in all_prompts()}


@functools.cache
def _video_prompts() -> dict[str, Any]:
    return {prompt.text: prompt for prompt in all_video_prompts()}


def _known_prompt(text: str, prompts: dict[str, Any]) -> Any:
    if text not in prompts:
        raise DatasetError(
            f"{text!r} is no prompt that the demo's judges know; theirs are the {len(prompts)} such as "
            f"{next(iter(prompts))!r}."
        )
    return prompts[text]


def _pixels(picture: np.ndarray) -> Tensor:
    """uint8 (32, 32, 3) -> float32 (3, 32, 32) in [-1, 1]."""
    if picture.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        height, width = picture.shape[:2]
        raise DatasetError(
            f"the demo's judges know pictures of {IMAGE_SIZE}x{IMAGE_SIZE} pixels; this one has {width}x{height}."
        )
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
