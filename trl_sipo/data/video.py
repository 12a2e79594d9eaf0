# SPDX-License-Identifier: Apache-2.0
"""Clips of pairs of videos: the same frames of both arms, whatever they are stored as."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from trl_sipo.data.frame_source import (
    MAX_DENOMINATOR,
    FrameSource,
    TimedFrame,
    frames_of_array,
    frames_of_folder,
    frames_of_images,
    frames_of_webp,
)
from trl_sipo.data.stored import EXPECTED, IMAGE_INSTEAD, checked_value, described, is_webp, quoted_path
from trl_sipo.data.video_file import VideoFile
from trl_sipo.errors import ConfigurationError, DatasetError

DEFAULT_FRAME_RATE = 24.0  # of frames that come without one: folders, lists and arrays

_RATE_TOLERANCE = 0.01  # 24 and 23.976 are one rate, 24 and 25 are not
_TIE = Fraction(1, 10)  # of a frame's length: within it, which frame is nearer depends on how times were rounded


@dataclass(frozen=True)
class ClipSampler:
    """Which frames of a video are taken.

    Args:
        num_frames: how many.
        frame_rate: frames per second of the clip: at each multiple of 1 / `frame_rate` seconds the nearest frame, but
            none more than half such a step before its time. None: consecutive frames, at the video's own rate.
        random_start: begin at a random frame; False: at the first.
        longer: further numbers of frames, ascending; each video takes the largest that it has frames for.

    Raises:
        ConfigurationError: a number that is not positive, or a random start with several numbers of frames.
    """

    num_frames: int
    frame_rate: float | None = None
    random_start: bool = False
    longer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.num_frames, bool) or not isinstance(self.num_frames, int) or self.num_frames < 1:
            raise ConfigurationError(f"num_frames must be a positive integer, found {self.num_frames!r}")
        rate = self.frame_rate
        if rate is not None and (
            isinstance(rate, bool) or not isinstance(rate, int | float) or not 1e-3 <= rate < 1e4
        ):
            raise ConfigurationError(
                f"frame_rate must be a positive number of frames per second, from 0.001 on, found {rate!r}"
            )

        if self.longer and self.random_start:
            raise ConfigurationError("a random start is drawn for one number of frames, not for several")

    def fitting(self, video: FrameSource) -> "ClipSampler":
        """The sampler of one number of frames that a video takes.

        Raises:
            DatasetError: the video has fewer than the smallest.
        """
        if not self.longer:
            return self
        length = checked_length(video, self)
        return replace(self, num_frames=max(n for n in (self.num_frames, *self.longer) if n <= length), longer=())

    @property
    def rate(self) -> Fraction | None:
        """`frame_rate` as a fraction, so that times compare exactly."""
        return None if self.frame_rate is None else Fraction(self.frame_rate).limit_denominator(MAX_DENOMINATOR)

    def for_evaluation(self) -> "ClipSampler":
        """The same frames every time: from the first on."""
        return replace(self, random_start=False)


def open_clips(
    chosen: Any,
    rejected: Any,
    sampler: ClipSampler,
    generator: torch.Generator | None = None,
    *,
    where: str = "the pair",
) -> tuple[list[PIL.Image.Image], list[PIL.Image.Image], float]:
    """The same frames of both videos of a pair.

    Args:
        chosen, rejected: what `open_video` opens. Of videos of different length the common range counts.
        sampler: which frames.
        generator: of the pair, on the CPU; one number is drawn from it whether or not the start is random, so that
            what is drawn after does not depend on it. May be None when the start is not random.
        where: what errors call the pair, such as `"row 3"`.

    Returns:
        Two lists of `num_frames` RGB images, or of as many as each arm takes, and their frames per second.

    Raises:
        DatasetError: a video is broken or too short (names the file, its length, and what is needed), or the arms are
            of different rates while `frame_rate` is not set.
        ConfigurationError: a random start without a generator.
    """
    clips, rate = open_arms_clips({"chosen": chosen, "rejected": rejected}, sampler, generator, where=where)
    return clips[0], clips[1], rate


def open_arms_clips(
    arms: Mapping[str, Any], sampler: ClipSampler, generator: torch.Generator | None = None, *, where: str
) -> tuple[list[list[PIL.Image.Image]], float]:
    """The same frames of the videos of one or two arms, and their frames per second; as `open_clips`."""
    videos = [
        open_video(value, frame_rate=sampler.rate, where=f"{where}, the {arm} video") for arm, value in arms.items()
    ]
    rate = common_rate(videos, sampler, where=where)
    start = _draw_start(videos, sampler, generator)
    return [read_clip(video, sampler.fitting(video), start) for video in videos], float(rate)


def open_video(value: Any, *, frame_rate: Fraction | None = None, where: str = "the video") -> FrameSource:
    """A video from whatever it is stored as.

    Args:
        value: the path or the bytes of a file that FFmpeg reads (mp4, webm, gif, mov, mkv, avi) or of an animated
            WebP, `{"bytes": ..., "path": ...}`, the path of a folder of frames, a list of frames (images, or their
            paths), or an array or tensor (frames, height, width, 3) of uint8.
        frame_rate: of frames that do not say theirs; None: `DEFAULT_FRAME_RATE`.
        where: what errors call it.

    Raises:
        DatasetError: none of these, not there, empty or broken.
        ConfigurationError: a file, while PyAV is not installed.
    """
    name = where + _file_name(value)
    rate = frame_rate or Fraction(DEFAULT_FRAME_RATE)
    value = checked_value(value, "video", where=where)
    if isinstance(value, Path) and value.is_dir():
        return frames_of_folder(value, rate, name)
    if isinstance(value, bytes | Path):
        return frames_of_webp(value, name) if is_webp(value) else VideoFile(value, name)
    if isinstance(value, PIL.Image.Image):
        raise DatasetError(f"{name} is an image, {IMAGE_INSTEAD}")
    if isinstance(value, np.ndarray | torch.Tensor):
        return frames_of_array(np.asarray(value), rate, name)
    if isinstance(value, list | tuple) and not _is_conversation(value):
        return (
            frames_of_array(_as_array(value, name), rate, name)
            if _is_nested(value)
            else frames_of_images(value, rate, name)
        )
    raise DatasetError(f"{where}: expected {EXPECTED['video']}, found {described(value, 'video')}")


def common_rate(videos: Sequence[FrameSource], sampler: ClipSampler, *, where: str) -> Fraction:
    """Frames per second of the clips of one arm or of both.

    Raises:
        DatasetError: unless `frame_rate` is set, the arms are of different rates or do not say theirs.
    """
    if sampler.rate is not None:
        return sampler.rate
    for video in videos:
        if video.rate is None:
            raise DatasetError(f"{video.name} does not say its frames per second: set `frame_rate`")
    chosen, rejected = videos[0], videos[-1]
    if abs(chosen.rate - rejected.rate) > _RATE_TOLERANCE * chosen.rate:
        raise DatasetError(
            f"{where}: the chosen video has {float(chosen.rate):.6g} frames per second and the rejected one "
            f"{float(rejected.rate):.6g}, so that the same frames would not show the same moments. Set `frame_rate`, "
            "to which both are then brought."
        )
    return chosen.rate


def read_clip(video: FrameSource, sampler: ClipSampler, start: int = 0) -> list[PIL.Image.Image]:
    """The frames of one arm.

    Args:
        video: from `open_video`.
        sampler: which frames.
        start: number of the first, among the frames of the video or, with `frame_rate`, of the video at that rate.

    Raises:
        DatasetError: too short, broken, or the frames are of different sizes.
    """
    if sampler.rate is None:
        images = [frame.open() for frame in itertools.islice(video.frames(start), sampler.num_frames)]
    else:
        times = [Fraction(start + number) / sampler.rate for number in range(sampler.num_frames)]
        first = video.timeline().shown_at(times[0]) if start else 0
        images = _frames_at(video.frames(first), times, 1 / sampler.rate)
    if len(images) < sampler.num_frames:
        raise DatasetError(_too_short(video, sampler, start + len(images)))
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise DatasetError(f"{video.name} has frames of different sizes (width, height): {sizes}")
    return images


def checked_length(video: FrameSource, sampler: ClipSampler) -> int:
    """How many frames a video has, at `frame_rate` if that is set.

    Raises:
        DatasetError: fewer than are needed.
    """
    timeline = video.timeline()
    length = len(timeline.starts)
    if sampler.rate is not None:
        length = math.floor(timeline.end * sampler.rate + Fraction(1, 2))
    if length < sampler.num_frames:
        raise DatasetError(_too_short(video, sampler, length))
    return length


def _draw_start(videos: Sequence[FrameSource], sampler: ClipSampler, generator: torch.Generator | None) -> int:
    draw = 0.0 if generator is None else torch.rand((), generator=generator).item()
    if not sampler.random_start:
        return 0
    if generator is None:
        raise ConfigurationError("a random start needs a torch.Generator; for_evaluation() needs none")
    room = min(checked_length(video, sampler) for video in videos) - sampler.num_frames
    return min(int(draw * (room + 1)), room)


def _frames_at(frames: Iterator[TimedFrame], times: Sequence[Fraction], step: Fraction) -> list[PIL.Image.Image]:
    """The nearest frame of each time; fewer images than times when the frames end before."""
    images: list[PIL.Image.Image] = []
    shown = next(frames, None)
    for following in itertools.chain(frames, [None]):
        if shown is None:
            break
        image = None
        while len(images) < len(times):
            time = times[len(images)]
            if following is None and time + step / 2 > shown.end:
                break
            if following is not None and _is_due(following, shown, time, step):
                break
            image = image or shown.open()
            images.append(image)
        if len(images) == len(times):
            break
        shown = following
    return images


def _is_due(following: TimedFrame, shown: TimedFrame, time: Fraction, step: Fraction) -> bool:
    """Whether a frame is to be taken rather than the one before it.

    A frame that stays long, as in many GIFs, is not left before its time because the next one is nearer than its
    beginning: half a step is the most. Ties stay with the earlier frame, also where files round their times.
    """
    early = following.start - time
    return early <= step / 2 and early + _TIE * (following.start - shown.start) < time - shown.start


def _too_short(video: FrameSource, sampler: ClipSampler, length: int) -> str:
    at_rate = "" if sampler.frame_rate is None else f" at `frame_rate` {sampler.frame_rate:g}"
    return (
        f"{video.name} is too short: it has {length} frames{at_rate}, and {sampler.num_frames} are needed "
        "(`num_frames`)"
    )


def _file_name(value: Any) -> str:
    """The path of a video, if it has one, as a part of its name in errors."""
    path = value.get("path") if isinstance(value, Mapping) else value
    return f" {quoted_path(os.fspath(path))}" if isinstance(path, str | os.PathLike) else ""


def _is_conversation(value: Sequence[Any]) -> bool:
    return len(value) > 0 and isinstance(value[0], Mapping) and "role" in value[0]


def _is_nested(value: Sequence[Any]) -> bool:
    """Whether a list holds numbers, as `datasets` stores arrays."""
    return len(value) > 0 and isinstance(value[0], list | tuple)


def _as_array(value: Sequence[Any], name: str) -> np.ndarray:
    """Checked before it is made uint8: conversion would cut values within [0, 1] to black, and wrap others."""
    what = f"{name} is no regular array of integers from 0 to 255"
    try:
        array = np.array(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{what} ({error})") from error
    if array.dtype.kind not in "iu":
        way_out = "; multiply by 255 what lies within [0, 1], and store it as uint8" * (array.dtype.kind == "f")
        raise DatasetError(f"{what}: it is of {array.dtype}{way_out}")
    if array.size and not 0 <= array.min() <= array.max() <= 255:
        raise DatasetError(f"{what}: its values are from {array.min()} to {array.max()}")
    return array.astype(np.uint8)
