# SPDX-License-Identifier: Apache-2.0
"""Videos as MP4 files, next to lossless: the same frames give the same bytes."""

from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trl_sipo.errors import ConfigurationError

# Next to lossless, since what is measured of a video is to be the model's. One thread: the bytes depend on how many.
_ENCODER = {"crf": "8", "preset": "medium", "threads": "1"}
_MAX_DENOMINATOR = 1001


def check_video_writing() -> None:
    """Raise [`ConfigurationError`] where PyAV is not installed."""
    _import_av()


def encode_video(target: Path | BinaryIO, frames: np.ndarray, frame_rate: float) -> None:
    """Write frames as H.264 in MP4.

    Args:
        target: A path, or a file open for writing that can seek.
        frames: uint8 (frames, height, width, 3), RGB.
        frame_rate: Frames per second.

    Raises:
        ConfigurationError: PyAV is not installed.
        OSError: The file cannot be written.
    """
    av = _import_av()
    height, width = frames.shape[1:3]
    rate = Fraction(frame_rate).limit_denominator(_MAX_DENOMINATOR)
    with av.open(str(target) if isinstance(target, Path) else target, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=rate, options=dict(_ENCODER))
        stream.width, stream.height = width, height
        # Half the colours' resolution is what every player reads; it needs even sizes.
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigurationError('Video files are written by PyAV: pip install "trl-sipo[video]".') from error
    return av
