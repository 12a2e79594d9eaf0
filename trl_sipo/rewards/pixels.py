# SPDX-License-Identifier: Apache-2.0
"""Pixels as the published scorers see them, by Pillow and torch: torchvision is not needed, and may not fit its torch.

Two ways to be square are in use. CLIP scales the shorter side and cuts the middle out of the longer one; HPSv2 scales
the longer side and pads the shorter one with black.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import PIL.Image
import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

CropRounding: TypeAlias = Literal["torchvision", "transformers"]

# Where a crop begins if an odd number of pixels is left over.
_CROP_START: dict[CropRounding, Callable[[int], int]] = {
    "torchvision": lambda left_over: round(left_over / 2),  # to even: 1 -> 0, 3 -> 2
    "transformers": lambda left_over: left_over // 2,  # 1 -> 0, 3 -> 1
}


def cropped_pixels(
    images: Sequence[PIL.Image.Image], side: int, *, rounding: CropRounding = "torchvision"
) -> torch.Tensor:
    """CLIP's: the shorter side to `side` by Pillow's bicubic filter, its middle square, CLIP's mean and deviation.

    Args:
        images: RGB, n of them.
        side: in pixels, what the model takes.
        rounding: whose crop is followed to the pixel; they differ where 3, 7, 11, ... pixels are left over.

    Returns:
        (n, 3, side, side) float32.
    """
    squares = [_centre_crop(_scale_shorter_side(image, side), side, rounding) for image in images]
    return normalise(torch.stack([_unit_pixels(square) for square in squares]))


def padded_pixels(images: Sequence[PIL.Image.Image], side: int, *, antialias: bool = True) -> torch.Tensor:
    """HPSv2's: the longer side to `side`, black on both sides of the shorter one, CLIP's mean and deviation.

    It scales tensors and not pictures, so that values beyond [0, 1], which a bicubic filter gives at edges, are kept.

    Args:
        images: RGB, n of them.
        side: in pixels, what the model takes.
        antialias: as torchvision 0.17 and later do by default; before, tensors were scaled without, which makes fine
            detail of large images flicker.

    Returns:
        (n, 3, side, side) float32.
    """
    return normalise(torch.stack([_padded(_unit_pixels(image), side, antialias) for image in images]))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 3, height, width) in [0, 1] less CLIP's mean, by its deviation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def _scale_shorter_side(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    shorter = min(image.size)
    width, height = (side if length == shorter else int(side * length / shorter) for length in image.size)
    return image.resize((width, height), PIL.Image.Resampling.BICUBIC)


def _centre_crop(image: PIL.Image.Image, side: int, rounding: CropRounding) -> PIL.Image.Image:
    left, top = (_CROP_START[rounding](length - side) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _unit_pixels(image: PIL.Image.Image) -> torch.Tensor:
    """(3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _padded(pixels: torch.Tensor, side: int, antialias: bool) -> torch.Tensor:
    longer = max(pixels.shape[1:])
    height, width = (max(1, round(length * side / longer)) for length in pixels.shape[1:])
    if longer != side:
        options = {"mode": "bicubic", "align_corners": False, "antialias": antialias}
        pixels = torch.nn.functional.interpolate(pixels[None], size=(height, width), **options)[0]
    left, top = (side - width) // 2, (side - height) // 2
    return torch.nn.functional.pad(pixels, (left, side - width - left, top, side - height - top))
