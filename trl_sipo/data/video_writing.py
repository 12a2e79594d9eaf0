# SPDX-License-Identifier: Apache-2.0
"""Videos as MP4 files, next to lossless: the same frames give the same bytes."""

from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trl_sipo.errors import ConfigurationError

# Next to lossless, since what is measured of a video is to be the model's. The bytes depend on the number of threads;
# and, of small videos, on what is in memory beside them, unless x264's macroblock tree is off (15 of 400 differed).
_ENCODER = {"crf": "8", "preset": "medium", "threads": "1", "mbtree": "0"}
# Colours at full resolution: at half of it (yuv420p) smooth content comes back 3.4 of 255 levels off in the mean, with
# it 1.1, in a file of the same size.
_PIXEL_FORMAT = "yuv444p"
_MAX_DENOMINATOR = 1001


def check_video_writing() -> None:
    """Raise [`ConfigurationError`] where PyAV is not installed."""
    _import_av()


def encode_video(
    target: Path | BinaryIO, frames: np.ndarray, frame_rate: float, *, for_browsers: bool = False
) -> None:
    """Write frames as H.264 in MP4.

    Colours have their full resolution, which FFmpeg, PyAV, OpenCV, decord, VLC and Chrome read, and QuickTime, Safari
    and Firefox do not: `ffmpeg -i a.mp4 -pix_fmt yuv420p b.mp4` makes one that everything plays.

    Args:
        target: A path, or a file open for writing that can seek.
        frames: uint8 (frames, height, width, 3), RGB.
        frame_rate: Frames per second.
        for_browsers: Colours at half the resolution, and the index first, so that every browser plays it at once. The
            target must be a path then, height and width even.

    Raises:
        ConfigurationError: PyAV is not installed.
        OSError: The file cannot be written.
    """
    av = _import_av()
    height, width = frames.shape[1:3]
    rate = Fraction(frame_rate).limit_denominator(_MAX_DENOMINATOR)
    options = {"movflags": "+faststart"} if for_browsers else {}
    file = str(target) if isinstance(target, Path) else target
    with av.open(file, "w", format="mp4", options=options) as output:
        stream = output.add_stream("libx264", rate=rate, options=dict(_ENCODER))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p" if for_browsers else _PIXEL_FORMAT
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigurationError('Video files are written by PyAV: pip install "trl-sipo[video]".') from error
    return av
