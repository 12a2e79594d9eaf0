# SPDX-License-Identifier: Apache-2.0
"""Files that tell nothing but their picture: one format, no metadata, and the length of what they are compared with.

The length of a compressed file tells how smooth a picture is, and so, often, which model drew it. Files are therefore
filled up, in a way that their formats provide for: a private chunk of a PNG, a `free` box of an MP4.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageFilter

from trl_sipo.data.images import verify_image
from trl_sipo.data.video import open_video
from trl_sipo.data.video_writing import encode_video
from trl_sipo.errors import StudyError

IMAGE_SUFFIX, VIDEO_SUFFIX = ".png", ".mp4"

_COMPRESSION = 1  # of PNG: files are filled up anyway
_BLOCK = 4096  # lengths are multiples of it
_CHUNK = b"paDd"  # a name that says: of nobody's concern, private, to be copied with the picture
_CHUNK_SIZE, _BOX_SIZE = 12, 8  # of their own, without content
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_BLUR, _NOISE = 0.04, 40.0  # of the shorter side; of 255 levels
_RATE_TOLERANCE = Fraction(1, 100)  # 24 and 23.976 are one rate, 24 and 25 are not


@dataclass(frozen=True)
class Medium:
    """A decoded image, or video.

    Attributes:
        frames: uint8 (frames, height, width, 3); of an image one.
        rate: Frames per second; None: an image.
    """

    frames: np.ndarray
    rate: Fraction | None = None

    @property
    def suffix(self) -> str:
        """Of the file that it becomes."""
        return IMAGE_SUFFIX if self.rate is None else VIDEO_SUFFIX


def read_medium(path: Path, *, is_video: bool) -> Medium:
    """Decode a file completely.

    Raises:
        DatasetError: It is broken, or of another kind.
        StudyError: A video whose frames are of different sizes, or which does not say its rate.
        ConfigurationError: A video, while PyAV is not installed.
    """
    if not is_video:
        return Medium(np.asarray(verify_image(path, where=str(path)))[None])
    video = open_video(path, where="the video")
    if video.rate is None:
        raise StudyError(f"{video.name} does not say its frames per second. Write it again with a constant rate.")
    images = [np.asarray(frame.open()) for frame in video.frames()]
    if len({image.shape for image in images}) > 1:
        raise StudyError(f"{video.name} has frames of different sizes.")
    return Medium(np.stack(images), video.rate)


def check_alike(media: dict[str, Medium], what: str) -> None:
    """Raise [`StudyError`] unless all have one size and, of videos, one length and rate: else these tell the model.

    Args:
        media: By model.
        what: They are samples of, for the error.
    """
    (name, one), *others = media.items()
    for other_name, other in others:
        if one.frames.shape[1:3] != other.frames.shape[1:3]:
            sizes = ["{1} x {0}".format(*medium.frames.shape[1:3]) for medium in (one, other)]
            raise StudyError(f"{what}: {name!r} is of {sizes[0]} pixels and {other_name!r} of {sizes[1]}. {_ALIKE}")
        if len(one.frames) != len(other.frames):
            raise StudyError(
                f"{what}: {name!r} has {len(one.frames)} frames and {other_name!r} {len(other.frames)}. {_ALIKE}"
            )
        if one.rate is not None and other.rate is not None and abs(one.rate - other.rate) > one.rate * _RATE_TOLERANCE:
            rates = [f"{float(medium.rate):.4g}" for medium in (one, other)]
            raise StudyError(
                f"{what}: {name!r} has {rates[0]} frames per second and {other_name!r} {rates[1]}. {_ALIKE}"
            )


_ALIKE = "That would tell raters which is which: draw or convert both alike."


def encode(medium: Medium, scratch: Path) -> bytes:
    """A file's content.

    Args:
        scratch: A path that may be written, and is not there before and after.
    """
    if medium.rate is None:
        buffer = io.BytesIO()
        PIL.Image.fromarray(medium.frames[0]).save(buffer, format="PNG", compress_level=_COMPRESSION)
        return buffer.getvalue()
    height, width = medium.frames.shape[1:3]
    # Colours of two by two pixels are one: the last row or column of an odd size comes twice.
    even = np.pad(medium.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    try:
        encode_video(scratch, even, float(medium.rate), for_browsers=True)
        return scratch.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)


def common_length(contents: list[bytes]) -> int:
    """The length in bytes that all of these can be filled up to."""
    longest = max(map(len, contents)) + max(_CHUNK_SIZE, _BOX_SIZE)
    return -(-longest // _BLOCK) * _BLOCK


def filled_up(content: bytes, length: int) -> bytes:
    """The same PNG or MP4 in a longer file.

    Args:
        length: From `common_length`.
    """
    if content.endswith(_END):
        data = _CHUNK + bytes(length - len(content) - _CHUNK_SIZE)
        chunk = struct.pack(">I", len(data) - len(_CHUNK)) + data + struct.pack(">I", zlib.crc32(data))
        return content[: -len(_END)] + chunk + _END
    rest = length - len(content)
    return content + struct.pack(">I", rest) + b"free" + bytes(rest - _BOX_SIZE)


def without_filling(content: bytes) -> bytes:
    """The file as it was before [`filled_up`]."""
    if content.endswith(_END):
        start = content.rfind(_CHUNK) - 4
        size = len(content) - len(_END) - start - _CHUNK_SIZE
        return content[:start] + _END if _says(content, start, size) else content
    start = content.rfind(b"free") - 4
    return content[:start] if _says(content, start, len(content) - start) else content


def _says(content: bytes, start: int, size: int) -> bool:
    """Whether a part of a file begins here that has this size, by the number that it begins with."""
    return start > 0 and int.from_bytes(content[start : start + 4], "big") == size


def degraded(medium: Medium, generator: np.random.Generator) -> Medium:
    """The same picture or video blurred and with noise on it: worse, whoever looks at it."""
    height, width = medium.frames.shape[1:3]
    blur = ImageFilter.GaussianBlur(max(1.0, _BLUR * min(height, width)))
    frames = [np.asarray(PIL.Image.fromarray(frame).filter(blur), dtype=np.float64) for frame in medium.frames]
    noisy = np.stack(frames) + generator.normal(0.0, _NOISE, medium.frames.shape)
    return Medium(noisy.round().clip(0, 255).astype(np.uint8), medium.rate)
