# SPDX-License-Identifier: Apache-2.0
"""What is found in one row: problems, or else its label, its prompt and the content of its arms."""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from trl_sipo.data.checking.features import arm_features
from trl_sipo.data.formats import PreferenceFormat, read_prompt
from trl_sipo.data.frame_source import FrameSource
from trl_sipo.data.images import verify_image
from trl_sipo.data.preference_dataset import read_latents
from trl_sipo.data.row_selection import row_key
from trl_sipo.data.stored import VIDEO_SUFFIXES, is_video, stored_value
from trl_sipo.data.video import ClipSampler, checked_length, common_rate, open_video
from trl_sipo.errors import DatasetError

_BYTES = 8  # of a hash: two of a million different contents are equal with a probability below one in ten millions
THUMBNAIL = (160, 160)  # pixels


@dataclass(frozen=True)
class CheckedArm:
    """One image, video or array of latents that opens.

    Args:
        content: a 63-bit hash: of the pixels of an image, the bytes of a video file, the numbers of latents. Images
            that look alike to the bit are one, however they are stored.
        size: width and height in pixels; of latents None.
        num_frames: of a video.
        frame_rate: of a video whose file says it.
        thumbnail: where it was asked for.
        features: those of `features.FEATURES`, where they were asked for.
    """

    content: int
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    thumbnail: PIL.Image.Image | None = None
    features: tuple[float, ...] = ()


@dataclass(frozen=True)
class CheckedRow:
    """What is known of a row.

    Args:
        number: its position.
        key: by which it is found again (`row_selection.row_key`).
        problems: why it cannot be trained on; empty: it can, unless it is a tie or has no label.
        prompt: None if it is none.
        label: share of votes for the first arm; NaN: nobody has judged it.
        arms: the first and the second; None if one does not open.
    """

    number: int
    key: str
    problems: tuple[str, ...]
    prompt: str | None = None
    label: float = float("nan")
    arms: tuple[CheckedArm, CheckedArm] | None = None


@dataclass(frozen=True)
class RowCheck:
    """How rows are looked at.

    Args:
        fmt: which column holds what.
        videos: the arms are videos, of which these frames are needed at least; None: images (or latents).
        decode: decode every frame of videos; False: the index of frames and the first one.
        measure: note the features of each arm, such as its brightness.
    """

    fmt: PreferenceFormat
    videos: ClipSampler | None = None
    decode: bool = False
    measure: bool = False

    def __call__(self, number: int, row: Mapping[str, Any], *, with_thumbnails: bool = False) -> CheckedRow:
        """Look at one row."""
        problems: list[str] = []
        prompt = _attempt(problems, lambda: read_prompt(row[self.fmt.prompt]))
        label = _attempt(problems, lambda: _label(self.fmt, row))
        arms = _attempt(problems, lambda: self._latents(row)) if self.fmt.holds_latents else self._media(row, problems)
        if with_thumbnails and arms is not None and not self.fmt.holds_latents:
            arms = tuple(_with_thumbnail(arm) for arm in arms)
        elif arms is not None:
            arms = tuple(_without_image(arm) for arm in arms)
        key = row_key(self.fmt, row)
        return CheckedRow(number, key, tuple(problems), prompt, float("nan") if label is None else label, arms)

    def _media(self, row: Mapping[str, Any], problems: list[str]) -> tuple[CheckedArm, CheckedArm] | None:
        """Both are opened even if the first is broken, so that all that is wrong is said at once."""
        opened: list[FrameSource] = []
        arms = []
        for column in self.fmt.media_columns:
            value, where = row[column], f"column {column!r}"
            look = functools.partial(self._image, value, where)
            if self.videos is not None:
                look = functools.partial(self._video, value, where, self.videos, opened)
            arms.append(_attempt(problems, look))
        if arms[0] is None or arms[1] is None:
            return None
        if self.videos is not None and self.videos.num_frames > 1:  # it is known what clips training will take
            _attempt(problems, functools.partial(common_rate, opened, self.videos, where="the row"))
        return arms[0], arms[1]

    def _image(self, value: Any, where: str) -> CheckedArm:
        image = verify_image(value, where=where)
        content = _hash([repr(image.size).encode(), image.tobytes()])
        features = arm_features(value, image) if self.measure else ()
        return CheckedArm(content, image.size, thumbnail=image, features=features)

    def _video(self, value: Any, where: str, clip: ClipSampler, opened: list[FrameSource]) -> CheckedArm:
        video = open_video(value, frame_rate=clip.rate, where=where)
        opened.append(video)
        length = checked_length(video, clip)
        first = None
        for frame in video.frames():
            image = frame.open()
            first = first or image
            if not self.decode:
                break
        if first is None:
            raise DatasetError(f"{where}: the video has no frames")
        rate = None if video.rate is None else round(float(video.rate), 3)
        features = arm_features(value, first, num_frames=length, frame_rate=rate) if self.measure else ()
        return CheckedArm(media_hash(value), first.size, length, rate, first, features)

    def _latents(self, row: Mapping[str, Any]) -> tuple[CheckedArm, CheckedArm]:
        pair = {"prompt": "", "chosen": row[self.fmt.first], "rejected": row[self.fmt.second]}
        latents = read_latents(pair, where="the row")
        chosen, rejected = (_hash([latents[f"{arm}_latents"].numpy().tobytes()]) for arm in ("chosen", "rejected"))
        return CheckedArm(chosen), CheckedArm(rejected)


def is_of_videos(value: Any) -> bool:
    """Whether a cell holds rather a video than an image; a GIF or WebP file may be either, and counts as an image."""
    value = stored_value(value)
    if isinstance(value, str | os.PathLike):
        # Not by the methods of paths, which raise errors on those that are too long.
        is_named_so = Path(value).suffix.lower() in VIDEO_SUFFIXES
        return os.path.isdir(value) or is_named_so or (os.path.isfile(value) and is_video(Path(value)))
    if isinstance(value, bytes):
        return is_video(value)
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 4)


def media_hash(value: Any) -> int:
    """A 63-bit hash of what a cell holds: the bytes of a file, or of the files of a folder or list in order."""
    return _hash(_contents(value))


def text_hash(text: str) -> int:
    """A 63-bit hash of a text."""
    return _hash([text.encode("utf-8", "surrogatepass")])


def _contents(value: Any) -> Iterator[bytes]:
    value = stored_value(value)
    if isinstance(value, list | tuple):
        for part in value:
            yield from _contents(part)
    elif isinstance(value, str | os.PathLike) and os.path.isdir(value):
        for file in sorted(path for path in Path(value).iterdir() if path.is_file()):
            yield from _contents(file)
    elif isinstance(value, str | os.PathLike):
        with open(value, "rb") as file:
            while block := file.read(1 << 20):
                yield block
    elif isinstance(value, bytes):
        yield value
    else:
        yield np.ascontiguousarray(value).tobytes()


def _hash(parts: Any) -> int:
    digest = hashlib.blake2b(digest_size=_BYTES)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "big") >> 1


def _with_thumbnail(arm: CheckedArm) -> CheckedArm:
    assert arm.thumbnail is not None
    small = PIL.ImageOps.contain(arm.thumbnail, THUMBNAIL)
    return replace(arm, thumbnail=small)


def _without_image(arm: CheckedArm) -> CheckedArm:
    return replace(arm, thumbnail=None)


def _label(fmt: PreferenceFormat, row: Mapping[str, Any]) -> float:
    if fmt.is_unlabelled(row):
        return float("nan")
    if fmt.label is None:
        return 1.0
    fmt.is_tie(row, where="the row")  # refuses what is no label
    return float(row[fmt.label])


def _attempt(problems: list[str], look: Any) -> Any:
    """What `look` gives; None when it finds a problem, which is noted."""
    try:
        return look()
    except DatasetError as error:
        problems.append(str(error))
        return None
