# SPDX-License-Identifier: Apache-2.0
"""Where sample grids are, and the single pictures beside them, from which a report makes what it shows.

samples/samples.json               prompts, seed, sampler, size
samples/base/00.png                of the reference, one per prompt; of videos an animated WebP
samples/step-000100/00.png         of the model at that step, from the same noise
samples/step-000100.png            the grid
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trl_sipo.data.cache.shards import write_whole
from trl_sipo.trainer.run_log import plain, set_aside

SAMPLES_FOLDER, SAMPLES_FILE, BASE_FOLDER = "samples", "samples.json", "base"
_COMPRESSION = 1  # of PNG: a tenth larger than the default, in a fraction of its time


def samples_folder(output_dir: str | Path) -> Path:
    """Where a run keeps its samples."""
    return Path(output_dir, SAMPLES_FOLDER)


def step_name(step: int) -> str:
    """The name of a step's pictures: that of their folder, and with a suffix that of the grid."""
    return f"step-{step:06d}"


def set_samples_aside(output_dir: str | Path) -> None:
    """Move the single pictures of an earlier run to `samples-1` and so on; a folder that holds none stays.

    Raises:
        OSError: They cannot be moved.
    """
    folder = samples_folder(output_dir)
    if (folder / SAMPLES_FILE).is_file():
        set_aside(folder)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what all samples of a run have in common.

    Raises:
        StorageError: It cannot be written.
    """
    text = json.dumps(plain(settings), indent=1)
    write_whole(folder / SAMPLES_FILE, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_samples(folder: Path, clips: Sequence[np.ndarray], frame_rate: float | None) -> None:
    """Write one file per prompt: a PNG, or an animated WebP of a video.

    Args:
        folder: Of one step.
        clips: (frames, height, width, 3) uint8 each.
        frame_rate: Of videos; `None`: they are images, of one frame.

    Raises:
        StorageError: One cannot be written.
    """
    for index, clip in enumerate(clips):
        frames = [Image.fromarray(frame) for frame in clip]
        name = f"{index:02d}"
        if frame_rate is None:
            write_picture(folder / f"{name}.png", frames[0])
        else:
            write_animation(folder / f"{name}.webp", frames, frame_rate)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    write_whole(path, lambda temporary: picture.save(temporary, format="PNG", compress_level=_COMPRESSION))


def write_animation(path: Path, frames: Sequence[Image.Image], frame_rate: float) -> None:
    """Write an animated WebP that plays again and again, whole or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    first, *others = frames
    options = {"duration": round(1000 / frame_rate), "loop": 0, "lossless": False}
    write_whole(
        path, lambda temporary: first.save(temporary, format="WEBP", save_all=True, append_images=others, **options)
    )
