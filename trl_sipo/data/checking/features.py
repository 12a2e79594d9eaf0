# SPDX-License-Identifier: Apache-2.0
"""Properties of an image or video that no preference should hang on, such as its size or its compression."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from trl_sipo.data.stored import stored_value

FEATURES = {
    "pixels": "the number of pixels",
    "aspect": "the ratio of width to height",
    "file_bytes": "the size of the file",
    "bytes_per_pixel": "the bytes per pixel, that is the strength of compression",
    "is_lossy": "a lossy file format (JPEG, lossy WebP, AVIF)",
    "brightness": "the brightness",
    "contrast": "the contrast",
    "colourfulness": "the saturation of colours",
    "sharpness": "the sharpness",
    "num_frames": "the number of frames",
    "frame_rate": "the frame rate",
}
"""Name of each, in order, and in words. Of a video, what is seen is that of its first frame."""

_NONE = float("nan")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"
_HEAD = 16  # bytes that tell the format of a file


def arm_features(
    value: Any, image: PIL.Image.Image, *, num_frames: int | None = None, frame_rate: float | None = None
) -> tuple[float, ...]:
    """The properties of one arm, in the order of `FEATURES`; NaN where there is none.

    Args:
        value: The cell, as it is stored: what is known of the file.
        image: The same, decoded, RGB; of a video its first frame.
        num_frames, frame_rate: Of a video.
    """
    size, head = _file(stored_value(value))
    pixels = np.asarray(image, dtype=np.float32) / 255
    luma = pixels @ np.array(_LUMA, dtype=np.float32)
    count = image.width * image.height
    found = {
        "pixels": float(count),
        "aspect": image.width / image.height,
        "file_bytes": _NONE if size is None else float(size),
        "bytes_per_pixel": _NONE if size is None else size / (count * (num_frames or 1)),
        "is_lossy": _NONE if head is None or num_frames is not None else float(_is_lossy(head)),
        "brightness": float(luma.mean()),
        "contrast": float(luma.std()),
        "colourfulness": float((pixels.max(-1) - pixels.min(-1)).mean()),
        "sharpness": _sharpness(luma),
        "num_frames": _NONE if num_frames is None else float(num_frames),
        "frame_rate": _NONE if frame_rate is None else float(frame_rate),
    }
    return tuple(found[name] for name in FEATURES)


def _sharpness(luma: np.ndarray) -> float:
    """Mean absolute Laplacian: how much a pixel differs from the mean of its neighbours."""
    if min(luma.shape) < 3:
        return _NONE
    middle = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float(np.abs(4 * middle - around).mean())


def _file(value: Any) -> tuple[int | None, bytes | None]:
    """Size and first bytes of a file, or of what was one; None of what is no file."""
    if isinstance(value, bytes):
        return len(value), value[:_HEAD]
    if isinstance(value, str | os.PathLike) and os.path.isfile(value):
        with Path(value).open("rb") as file:
            return os.stat(value).st_size, file.read(_HEAD)
    return None, None


def _is_lossy(head: bytes) -> bool:
    is_jpeg = head.startswith(b"\xff\xd8\xff")
    is_lossy_webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8 "
    return is_jpeg or is_lossy_webp or head[4:12] == b"ftypavif"
