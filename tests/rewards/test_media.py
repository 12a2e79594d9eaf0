# SPDX-License-Identifier: Apache-2.0
"""Media before they are scored."""

import io

import numpy as np
import PIL.ExifTags
import pytest
from PIL import Image

from tests.rewards.tiny import pictures
from trl_sipo.errors import DatasetError
from trl_sipo.rewards.media import check_samples, content_hash, to_rgb, video_frames

VIDEO = np.zeros((5, 4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("media", "prompts", "message"),
    [
        ([VIDEO], [], "1 images or videos and 0 prompts"),
        (pictures(2), ["a"], "2 images or videos and 1 prompts"),
        (pictures(1), [None], "prompt 0 is no text but a NoneType"),
        ([VIDEO, "picture.png"], ["a", "b"], "medium 1 is neither .* but a str"),
        ([VIDEO[0]], ["a"], r"but a uint8 array \(4, 6, 3\)"),
        ([VIDEO[:0]], ["a"], r"but a uint8 array \(0, 4, 6, 3\)"),
        ([VIDEO.astype(np.float32)], ["a"], "but a float32 array"),
    ],
    ids=range(7),
)
def test_what_is_no_sample(media, prompts, message):
    with pytest.raises(DatasetError, match=f"mine.*{message}"):
        check_samples(media, prompts, name="mine")


def test_images_are_what_a_viewer_shows():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    assert list(to_rgb(clear).get_flattened_data()) == [(255, 255, 255), (0, 0, 255)]
    turned = Image.new("RGB", (3, 2))
    turned.getexif()[PIL.ExifTags.Base.Orientation] = 6
    assert to_rgb(turned).size == (2, 3)
    with pytest.raises(DatasetError, match="image 3: a floating point image"):
        to_rgb(Image.new("F", (2, 2)), where="image 3")


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(5, 1, [2]), (8, 2, [2, 6]), (9, 3, [1, 4, 7]), (10, 4, [1, 3, 6, 8]), (3, 8, [0, 1, 2]), (1, 1, [0])],
)
def test_frames_are_evenly_spaced(total, count, expected):
    video = np.broadcast_to(np.arange(total, dtype=np.uint8)[:, None, None, None], (total, 2, 4, 3))
    frames = video_frames(video, count)
    assert [frame.getpixel((0, 0))[0] for frame in frames] == expected
    assert all(frame.size == (4, 2) and frame.mode == "RGB" for frame in frames)


def test_the_hash_is_of_the_pixels():
    one, other = pictures(2)
    stored = io.BytesIO()
    one.save(stored, "PNG")
    assert content_hash(Image.open(stored)) == content_hash(one) == content_hash(one.convert("RGBA"))
    changed = one.copy()
    changed.putpixel((3, 3), (1, 2, 3))
    turned = one.transpose(Image.Transpose.ROTATE_90)
    reshaped = Image.frombytes("RGB", (one.height, one.width), one.tobytes())
    as_video, longer = np.asarray(one)[None], np.asarray(one)[None].repeat(2, 0)
    media = [one, other, changed, turned, reshaped, as_video, longer]
    assert len({content_hash(medium) for medium in media}) == len(media)
    assert content_hash(longer[:, ::-1][:, ::-1]) == content_hash(longer)
