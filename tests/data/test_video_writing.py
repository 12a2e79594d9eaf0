# SPDX-License-Identifier: Apache-2.0
"""Videos that are written are read again as they were, nearly; the same frames give the same bytes."""

import io
from fractions import Fraction

import numpy as np
import pytest

from trl_sipo.data.video import open_video
from trl_sipo.data.video_writing import encode_video


def frames_of(count: int, height: int, width: int) -> np.ndarray:
    """Smooth colours that move."""
    time, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 9 + time / 3), np.cos(y / 7), np.sin((x + y) / 11 - time / 2)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "rate"), [(48, 64, 8), (33, 47, 16), (48, 64, 29.97), (16, 16, 0.5)])
def test_what_is_written_is_read_again(height, width, rate, tmp_path):
    frames = frames_of(9, height, width)
    encode_video(tmp_path / "video.mp4", frames, rate)
    video = open_video(tmp_path / "video.mp4")
    read = np.stack([np.asarray(frame.open()) for frame in video.frames()])
    assert read.shape == frames.shape and video.timeline().is_regular
    assert float(video.rate) == pytest.approx(rate, rel=1e-3)
    error = np.abs(read.astype(int) - frames)
    assert error.mean() < 2 and error.max() < 24


def test_the_bytes_depend_on_the_frames_and_the_rate_alone(tmp_path):
    frames, written = frames_of(5, 32, 32), []
    for number, rate in enumerate((16, 16, Fraction(15))):
        encode_video(tmp_path / f"{number}.mp4", frames, rate)
        written.append((tmp_path / f"{number}.mp4").read_bytes())
    assert written[0] == written[1] != written[2]
    for _ in range(60):
        np.random.default_rng().integers(0, 255, (100, 1000))  # leaves other memory behind each time
        buffer = io.BytesIO()
        encode_video(buffer, frames, 16)
        assert buffer.getvalue() == written[0]
