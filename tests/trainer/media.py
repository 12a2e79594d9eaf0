# SPDX-License-Identifier: Apache-2.0
"""Preference pairs of the size that a backbone's tiny pipeline draws."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from tests.adapters.backbone_cases import BackboneCase
from tests.data.clips import write_frames
from tests.trainer.runs import PROMPTS

_ARMS = ("chosen", "rejected")


def _picture(seed: int, height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _clip(seed: int, num_frames: int, height: int, width: int) -> list[Image.Image]:
    """A picture that moves to the side."""
    wide = _picture(seed, height, width + 2 * num_frames)
    return [wide.crop((2 * i, 0, 2 * i + width, height)) for i in range(num_frames)]


def pairs_for(
    case: BackboneCase, folder: Path, count: int = 4, rate: float = 12, is_video: bool = True
) -> datasets.Dataset:
    """Pairs of pictures, or of mp4 files, of the size that the case draws."""
    height, width, num_frames = case.size["height"], case.size["width"], case.size["num_frames"]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    if num_frames == 1 or not is_video:
        arms = {arm: [_picture(10 * i + k, height, width) for i in range(count)] for k, arm in enumerate(_ARMS)}
        return datasets.Dataset.from_dict({"prompt": prompts, **arms})
    arms = {
        arm: [
            str(write_frames(folder / f"{arm}{i}.mp4", _clip(10 * i + k, num_frames, height, width), rate=rate))
            for i in range(count)
        ]
        for k, arm in enumerate(_ARMS)
    }
    return datasets.Dataset.from_dict({"prompt": prompts, **arms})
