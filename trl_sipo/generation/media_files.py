# SPDX-License-Identifier: Apache-2.0
"""Samples as files, whole or not there: PNG images and H.264 videos."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trl_sipo.data.cache.shards import write_whole
from trl_sipo.data.images import open_image
from trl_sipo.data.video import open_video
from trl_sipo.data.video_writing import encode_video

IMAGE_SUFFIX, VIDEO_SUFFIX = ".png", ".mp4"

_COMPRESSION = 1  # of PNG: a tenth larger than the default, in a fraction of its time


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """Pixels (3, [frames,] height, width) in [-1, 1] to frames (frames, height, width, 3) uint8; NaN becomes black."""
    frames = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels
    levels = (frames.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def write_image(path: Path, pixels: torch.Tensor) -> None:
    """Write pixels (3, height, width) in [-1, 1] as PNG.

    Raises:
        StorageError: The file cannot be written.
    """
    image = Image.fromarray(to_frames(pixels)[0])
    write_whole(path, lambda temporary: image.save(temporary, format="PNG", compress_level=_COMPRESSION))


def write_video(path: Path, pixels: torch.Tensor, frame_rate: float) -> None:
    """Write pixels (3, frames, height, width) in [-1, 1] as MP4.

    Raises:
        ConfigurationError: PyAV is not installed.
        StorageError: The file cannot be written.
    """
    frames = to_frames(pixels)
    write_whole(path, lambda temporary: encode_video(temporary, frames, frame_rate))


def open_sample(path: Path) -> Image.Image | np.ndarray:
    """An RGB image, or the frames of a video, uint8 (frames, height, width, 3).

    Raises:
        ConfigurationError: A video, while PyAV is not installed.
        DatasetError: The file is not there, or broken.
    """
    if path.suffix == IMAGE_SUFFIX:
        return open_image(path, where=str(path))
    return np.stack([np.asarray(frame.open()) for frame in open_video(path, where=str(path)).frames()])
