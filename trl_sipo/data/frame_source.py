# SPDX-License-Identifier: Apache-2.0
"""What a video is here, wherever its frames come from; and those that come one by one: folders, lists, arrays."""

import functools
import io
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image

from trl_sipo.data.images import open_image
from trl_sipo.data.json_text import parse_json
from trl_sipo.data.stored import FRAME_SUFFIXES, IMAGE_INSTEAD
from trl_sipo.errors import DatasetError

MAX_DENOMINATOR = 100_000  # of a rate: frames per second as a fraction, so that times compare exactly

_RATE_FILE = "metadata.json"
_RATE = re.compile(r"\d{1,9}(\.\d{1,9})?(/\d{1,9})?")
_SLOWEST, _FASTEST = 1e-3, 1e4


@dataclass(frozen=True)
class TimedFrame:
    """One frame that may be needed.

    Args:
        start, end: when it is shown, in seconds from the first frame of the video.
        open: makes the RGB image; a frame that is passed over is never converted.
    """

    start: Fraction
    end: Fraction
    open: Callable[[], PIL.Image.Image]


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video is shown.

    Args:
        starts: seconds from the first frame, ascending from 0.
        end: when the last frame ends.
    """

    starts: tuple[Fraction, ...]
    end: Fraction

    def shown_at(self, time: Fraction) -> int:
        """The frame that is on the screen at a time."""
        return max(bisect_right(self.starts, time) - 1, 0)

    @property
    def is_regular(self) -> bool:
        """Whether all frames last about as long: formats that count in hundredths of a second round their times."""
        lengths = [after - before for before, after in zip(self.starts, (*self.starts[1:], self.end), strict=True)]
        return max(lengths) <= Fraction(3, 2) * min(lengths)


class FrameSource(Protocol):
    """A video: `open_video` makes one of whatever is stored.

    Attributes:
        name: what errors call it.
        rate: frames per second; None where the file does not say.
    """

    name: str
    rate: Fraction | None

    def timeline(self) -> Timeline:
        """All frames' times, without decoding them where the format allows."""
        ...

    def frames(self, first: int = 0) -> Iterator[TimedFrame]:
        """The frames from number `first` on, in the order in which they are shown."""
        ...


class FrameSequence:
    """Frames that can be opened one by one.

    Args:
        open_frame: the image of a frame, from its number; called with ascending numbers.
        timeline: when each is shown.
        rate: frames per second.
        name: what errors call it.
    """

    def __init__(
        self, open_frame: Callable[[int], PIL.Image.Image], timeline: Timeline, rate: Fraction | None, name: str
    ) -> None:
        self.name = name
        self.rate = rate
        self._open_frame = open_frame
        self._timeline = timeline

    def timeline(self) -> Timeline:
        return self._timeline

    def frames(self, first: int = 0) -> Iterator[TimedFrame]:
        starts, end = self._timeline.starts, self._timeline.end
        spans = list(zip(starts, (*starts[1:], end), strict=True))
        for number in range(first, len(spans)):
            yield TimedFrame(*spans[number], functools.partial(self._open_frame, number))


def frames_of_images(images: Sequence[Any], rate: Fraction, name: str) -> FrameSequence:
    """One frame per image, whatever `open_image` opens, all shown for as long.

    Raises:
        DatasetError: there are none.
    """

    def open_frame(number: int) -> PIL.Image.Image:
        return open_image(images[number], where=f"{name}, frame {number}")

    return FrameSequence(open_frame, _even_timeline(len(images), rate, name), rate, name)


def frames_of_array(array: np.ndarray, rate: Fraction, name: str) -> FrameSequence:
    """The frames of a uint8 array (frames, height, width, 3).

    Raises:
        DatasetError: it is of another kind, or has no frames.
    """
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise DatasetError(
            f"{name} is an array of {array.dtype}, of the shape {array.shape}; as a video it must be of uint8, of the "
            "shape (frames, height, width, 3)"
        )
    timeline = _even_timeline(len(array), rate, name)
    return FrameSequence(lambda number: PIL.Image.fromarray(array[number]), timeline, rate, name)


def frames_of_folder(folder: Path, default_rate: Fraction, name: str) -> FrameSequence:
    """The images of a folder, in the order of the numbers in their names.

    The rate is `fps` of a file `metadata.json` in the folder, if there is one.

    Raises:
        DatasetError: no images, or a `metadata.json` that cannot be read.
    """
    images = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES and path.name[0] != "."]
    if not images:
        raise DatasetError(f"{name} is a folder without frames ({', '.join(sorted(FRAME_SUFFIXES))})")
    images.sort(key=lambda path: _natural_order(path.name))
    return frames_of_images(images, _folder_rate(folder / _RATE_FILE, name) or default_rate, name)


def frames_of_webp(file: str | bytes, name: str) -> FrameSequence:
    """The frames of an animated WebP, by Pillow: FFmpeg does not read them.

    Raises:
        DatasetError: the file is broken, or has one frame only and so is an image.
    """
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        image = PIL.Image.open(io.BytesIO(content), formats=("WEBP",))
        ends = [Fraction(0)]
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            ends.append(ends[-1] + Fraction(int(image.info.get("duration", 0)), 1000))
    except (OSError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise DatasetError(f"{name} does not open ({type(error).__name__}: {error})") from error
    if len(ends) == 2:
        raise DatasetError(f"{name} is an image, {IMAGE_INSTEAD}")

    def open_frame(number: int) -> PIL.Image.Image:
        image.seek(number)
        return open_image(image, where=f"{name}, frame {number}")

    rate = (len(ends) - 1) / ends[-1] if ends[-1] else None
    return FrameSequence(open_frame, Timeline(tuple(ends[:-1]), ends[-1]), rate, name)


def _even_timeline(num_frames: int, rate: Fraction, name: str) -> Timeline:
    if num_frames == 0:
        raise DatasetError(f"{name} has no frames")
    return Timeline(tuple(number / rate for number in range(num_frames)), num_frames / rate)


def _natural_order(text: str) -> list[tuple[int, str]]:
    """Sorts "2.png" before "10.png"."""
    # Between digits of ASCII there may be others, such as a superscript, which `int` does not take.
    parts = re.split(r"([0-9]+)", text)
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts]


def _folder_rate(file: Path, name: str) -> Fraction | None:
    if not file.is_file():
        return None
    try:
        stated = parse_json(file.read_text(encoding="utf-8"), f"{name}: {file.name}")["fps"]
        if isinstance(stated, str) and not _RATE.fullmatch(stated):  # "1e999999999" would take all memory
            raise ValueError(f"{stated:.20}")
        rate = Fraction(stated).limit_denominator(MAX_DENOMINATOR)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise DatasetError(f"{name}: 'fps' of {file.name} must be a number ({error!r:.80})") from error
    if not _SLOWEST <= rate < _FASTEST:
        raise DatasetError(
            f"{name}: 'fps' of {file.name} must be positive, from {_SLOWEST:g} to {_FASTEST:g}, found {stated!r:.20}"
        )
    return rate
