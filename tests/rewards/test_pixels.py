# SPDX-License-Identifier: Apache-2.0
"""Images as the published scorers see them, to the pixel."""

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.rewards.tiny import pictures
from trl_sipo.rewards.pixels import CLIP_MEAN, CLIP_STD, cropped_pixels, normalise, padded_pixels

MEAN, STD = np.array(CLIP_MEAN)[:, None, None], np.array(CLIP_STD)[:, None, None]


def _columns(width: int, height: int) -> Image.Image:
    """Every column of another grey: its own number."""
    return Image.fromarray(np.tile(np.arange(width, dtype=np.uint8)[None, :, None], (height, 1, 3)))


def _greys(pixels: torch.Tensor) -> list[int]:
    """Those along the width of a prepared image."""
    values = pixels[0, 0, 0].double() * CLIP_STD[0] + CLIP_MEAN[0]
    return (255 * values).round().int().tolist()


@pytest.mark.parametrize("size", [(224, 224), (300, 224), (224, 231), (640, 427), (51, 90), (8, 224)], ids=str)
def test_cropped_as_transformers_does(size):
    images = pictures(2, size)
    expected = CLIPImageProcessorPil()(images, return_tensors="pt")["pixel_values"]
    pixels = cropped_pixels(images, 224, rounding="transformers")
    assert pixels.shape == (2, 3, 224, 224) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("left_over", "torchvision", "transformers"), [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (5, 2, 2), (7, 4, 3)]
)
def test_where_a_crop_begins(left_over, torchvision, transformers):
    """torchvision rounds the half that is left over to even, transformers down."""
    wide = _columns(16 + left_over, 16)
    for rounding, start in (("torchvision", torchvision), ("transformers", transformers)):
        across = cropped_pixels([wide], 16, rounding=rounding)
        assert _greys(across) == list(range(start, start + 16))
        down = cropped_pixels([wide.transpose(PIL.Image.Transpose.TRANSPOSE)], 16, rounding=rounding)
        assert torch.equal(down, across.transpose(-1, -2))


def test_one_colour_by_hand():
    pixels = cropped_pixels([Image.new("RGB", (50, 31), (255, 0, 51))], 8)[0]
    by_hand = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    np.testing.assert_allclose(pixels[:, 3, 4], by_hand, atol=1e-6)
    assert torch.equal(pixels, pixels[:, :1, :1].expand_as(pixels))


def test_padded_with_black_before_normalising():
    white = Image.new("RGB", (20, 7), (255, 255, 255))
    pixels = padded_pixels([white], 20)[0]
    white_and_black = normalise(torch.tensor([1.0, 0.0])[:, None, None, None].expand(2, 3, 1, 1))[..., 0, 0]
    rows = pixels[:, :, 5].T
    assert torch.equal(rows[6:13], white_and_black[:1].expand(7, 3))  # 13 left over: 6 above, 7 below
    assert torch.equal(torch.cat([rows[:6], rows[13:]]), white_and_black[1:].expand(13, 3))


@pytest.mark.parametrize("size", [(60, 33), (33, 60), (12, 9)], ids=str)
def test_padded_by_a_bicubic_filter_of_floats(size):
    """Pillow's filter of floating point images is the same, and keeps what goes beyond the range too."""
    image = pictures(1, size)[0]
    side = 24
    height, width = (round(length * side / max(size)) for length in size)
    channels = [np.asarray(image)[..., c].astype(np.float32) / 255 for c in range(3)]
    scaled = [np.asarray(Image.fromarray(c).resize((width, height), PIL.Image.Resampling.BICUBIC)) for c in channels]
    top, left = (side - height) // 2, (side - width) // 2
    expected = np.zeros((3, side, side))
    expected[:, top : top + height, left : left + width] = scaled
    if min(size) == 9:
        assert expected.max() > 1 or expected.min() < 0
    np.testing.assert_allclose(padded_pixels([image], side)[0], (expected - MEAN) / STD, atol=2e-5)


def test_padded_without_antialiasing_is_another_image():
    image = pictures(1, (60, 60))[0]
    assert (padded_pixels([image], 24) - padded_pixels([image], 24, antialias=False)).abs().mean() > 0.1


def test_a_line_of_pixels_is_kept():
    assert padded_pixels([Image.new("RGB", (1000, 1), "white")], 16)[0, 0].amax(1).argmax() == 7
