# SPDX-License-Identifier: Apache-2.0
"""Samples as a scorer gets them: files beside it, or their bytes in the message."""

import base64
import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trl_sipo.data.video_writing import encode_video
from trl_sipo.errors import StorageError
from trl_sipo.rewards.base import Media
from trl_sipo.rewards.media import to_rgb

_COMPRESSION = 1  # of PNG, which is read once


def as_file(medium: Media, prompt: str, stem: Path, frame_rate: float) -> dict[str, Any]:
    """The sample of a message, its medium written to a file of this name and the suffix of its format.

    Raises:
        ConfigurationError: A video, while PyAV is not installed.
        DatasetError: An image that does not convert to RGB.
        StorageError: The file cannot be written.
    """
    kind, suffix = _kind(medium)
    path = stem.with_name(f"{stem.name}.{suffix}")
    try:
        with path.open("wb") as file:
            _write(medium, file, frame_rate)
    except OSError as error:
        raise StorageError(f"{str(path)!r}, for a scorer to read, cannot be written: {error}.") from error
    return {"kind": kind, "prompt": prompt, "path": str(path)}


def as_data(medium: Media, prompt: str, frame_rate: float) -> dict[str, Any]:
    """The sample of a message, its medium in it: the bytes of a PNG or MP4 file, as base64.

    Raises:
        ConfigurationError: A video, while PyAV is not installed.
        DatasetError: An image that does not convert to RGB.
    """
    (kind, suffix), file = _kind(medium), io.BytesIO()
    _write(medium, file, frame_rate)
    return {"kind": kind, "prompt": prompt, "format": suffix, "data": base64.b64encode(file.getvalue()).decode()}


def _kind(medium: Media) -> tuple[str, str]:
    return ("video", "mp4") if isinstance(medium, np.ndarray) else ("image", "png")


def _write(medium: Media, file: BinaryIO, frame_rate: float) -> None:
    if isinstance(medium, np.ndarray):
        encode_video(file, medium, frame_rate)
    else:
        to_rgb(medium).save(file, format="PNG", compress_level=_COMPRESSION)
