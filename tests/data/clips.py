# SPDX-License-Identifier: Apache-2.0
"""Small videos whose frames tell their number by how bright they are."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from trl_sipo.data.video import ClipSampler, open_video, read_clip

SIZE = (32, 24)  # width, height

# Suffix: codec, pixel format, options. Few key frames and many B-frames, so that seeking has something to get wrong.
_H264 = ("libx264", "yuv420p", {"g": "7", "bf": "2", "crf": "10"})
_CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    ".mp4": _H264,
    ".mov": ("libx264", "yuv420p", {"crf": "10", "x264-params": "open-gop=1:keyint=7:scenecut=0"}),
    ".mkv": _H264,
    ".webm": ("libvpx-vp9", "yuv420p", {"g": "9", "crf": "10", "b": "0"}),
    ".avi": ("mpeg4", "yuv420p", {"g": "7", "bf": "0", "qmin": "1", "qmax": "2"}),
    ".gif": ("gif", "gray", {}),
}
VP8 = ("libvpx", "yuv420p", {"g": "9", "crf": "4", "b": "1M"})
MPEG4 = ("mpeg4", "yuv420p", {"g": "7", "bf": "2", "qmin": "1", "qmax": "2"})
HEVC = ("libx265", "yuv420p", {"crf": "10", "x265-params": "keyint=7:open-gop=1:log-level=none"})
AV1 = ("libsvtav1", "yuv420p", {"crf": "10", "svtav1-params": "keyint=7"})
SUFFIXES = tuple(_CODECS)


def grey(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Frame `number` of every video here."""
    return Image.new("RGB", size, (10 + 8 * number,) * 3)


def numbers(frames: Any) -> list[int]:
    """The numbers of frames; fails on one that is not a frame of these videos."""
    found = []
    for frame in frames:
        levels = np.asarray(frame.convert("RGB")).astype(float)
        number = round((levels.mean() - 10) / 8)
        assert np.abs(levels - (10 + 8 * number)).max() <= 3.5, levels.mean()
        found.append(number)
    return found


def write_video(
    path: Path,
    num_frames: int = 20,
    *,
    rate: float = 24,
    codec: tuple[str, str, dict[str, str]] | None = None,
    size: tuple[int, int] = SIZE,
    first: int = 0,
    start: int = 0,
    container: dict[str, str] | None = None,
) -> Path:
    """A video of the frames `grey(first)`, `grey(first + 1)`, ..., the first of which is shown at `start` / `rate`."""
    frames = [grey(first + number, size) for number in range(num_frames)]
    return write_frames(path, frames, rate=rate, codec=codec, start=start, container=container)


def write_frames(
    path: Path,
    frames: list[Image.Image],
    *,
    rate: float = 24,
    codec: tuple[str, str, dict[str, str]] | None = None,
    start: int = 0,
    rotation: dict[str, Any] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A video of these frames."""
    name, pixel_format, options = codec or _CODECS[path.suffix]
    step = Fraction(rate).limit_denominator(1001)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(name, rate=step, options=dict(options))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = pixel_format
        if rotation is not None:
            stream.set_display_rotation(**rotation)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgba" if image.mode == "RGBA" else "rgb24")
            frame = frame.reformat(format=pixel_format)
            frame.pts, frame.time_base = start + number, 1 / step
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def damaged(path: Path, begin: float, end: float) -> Path:
    """Damage an MP4 in this range of its pictures; the index, at the end of the file, stays whole."""
    content = bytearray(path.read_bytes())
    pictures, index = content.index(b"mdat") + 4, content.rindex(b"moov") - 4
    for position in range(pictures + int(begin * (index - pictures)), pictures + int(end * (index - pictures)), 23):
        content[position] ^= 0x5A
    path.write_bytes(content)
    return path


def write_animation(path: Path, milliseconds: list[int]) -> Path:
    """A GIF or WebP by Pillow, whose frames are shown for these times."""
    first, *others = [grey(number) for number in range(len(milliseconds))]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=milliseconds, **options)
    return path


def write_folder(folder: Path, num_frames: int = 8) -> Path:
    """A folder of frames whose names sort by number only if read as numbers: 0.png, 1.png, ..., 10.png."""
    folder.mkdir(parents=True)
    for number in range(num_frames):
        grey(number).save(folder / f"{number}.png")
    return folder


def clip_of(value: Any, num_frames: int, start: int = 0, **options: Any) -> list[int]:
    """The numbers of the frames of one clip."""
    sampler = ClipSampler(num_frames, **options)
    return numbers(read_clip(open_video(value, frame_rate=sampler.rate), sampler, start))
