# SPDX-License-Identifier: Apache-2.0
"""Videos that are broken, cut off, too short or no videos: each is named, and none is read in part."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from tests.data.clips import (
    MPEG4,
    clip_of,
    damaged,
    grey,
    numbers,
    write_frames,
    write_video,
)
from tests.data.pictures import encoded, picture
from trl_sipo.data import video_file
from trl_sipo.data.seeding import seeded_generator
from trl_sipo.data.video import ClipSampler, open_clips, open_video, read_clip
from trl_sipo.errors import ConfigurationError, DatasetError


def truncated(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def noise(path: Path, num_frames: int = 24, **options: Any) -> Path:
    return write_frames(path, [picture(seed, 64, 64) for seed in range(num_frames)], **options)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: truncated(write_video(path), 0.9), "is broken, or no video"),
        (lambda path: damaged(noise(path), 0.1, 0.9), "is broken"),
        (lambda path: written(path, b""), r"is empty \(0 bytes\)"),
        (lambda path: written(path, b"a text, and no video at all\n" * 20), "is broken, or no video"),
        (lambda path: written(path, encoded(picture(0))), "is an image, where a video is expected.*`num_frames`"),
        (lambda path: written(path, encoded(picture(0), "JPEG")), "is an image"),
        (lambda path: written(path, encoded(picture(0), "WEBP")), "is an image"),
        (lambda path: written(path, encoded(picture(0), "WEBP")[:-200]), "does not open|is an image"),
        (lambda path: write_video(path, 7), "is too short: it has 7 frames, and 20 are needed"),
        (lambda path: audio_only(path.with_suffix(".mkv")).rename(path), "has no video, only"),
        (lambda path: path.mkdir() or path, "is a folder without frames"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_files_are_named(tmp_path, make, message):
    good, bad = write_video(tmp_path / "good.mp4", 24), make(tmp_path / "clip 07.mp4")
    for random_start in (False, True):
        with pytest.raises(DatasetError, match=f"(?s)^row 3, the rejected video.*clip 07.mp4'.*{message}"):
            open_clips(good, bad, ClipSampler(20, random_start=random_start), seeded_generator(0), where="row 3")


@pytest.mark.parametrize("make", [lambda path: truncated(path, 0.6)], ids=["truncated"])
def test_a_truncated_file_with_its_index_first(tmp_path, make):
    """The beginning can still be read, until the frames are missing."""
    path = noise(tmp_path / "a.mp4", 20, container={"movflags": "faststart"})
    assert len(read_clip(open_video(make(path)), ClipSampler(3))) == 3
    with pytest.raises(DatasetError, match="a.mp4' is broken"):
        read_clip(open_video(path), ClipSampler(18))
    with pytest.raises(DatasetError, match="a.mp4' is broken: it ends within frame"):
        open_video(path).timeline()


def test_a_frame_that_the_decoder_mends_is_named(tmp_path):
    """What is damaged is concealed by the decoder, with whatever was there before."""
    path = damaged(noise(tmp_path / "a.mp4", 20, codec=MPEG4), 0.55, 0.6)
    assert len(read_clip(open_video(path), ClipSampler(6))) == 6
    with pytest.raises(DatasetError, match=r"a.mp4' is broken: the frame at 0.\d\d\d s is damaged"):
        read_clip(open_video(path), ClipSampler(18))


@pytest.mark.parametrize(("offset", "is_used"), [(-1, False), (1, True)])
def test_after_a_seek_only_frames_that_may_be_referred_to_must_be_whole(tmp_path, monkeypatch, offset, is_used):
    video = open_video(write_video(tmp_path / "a.mp4", 20))
    start = next(number for number in range(10, 20) if video._index.times[number] not in video._index.keys)
    key = video._index.seek_point(video._index.times[start])
    decode = video_file._decode

    def with_a_damaged_frame(*given: Any) -> Any:
        yield SimpleNamespace(pts=key + offset, time=0.4, is_corrupt=True)
        yield from decode(*given)

    monkeypatch.setattr(video_file, "_decode", with_a_damaged_frame)
    if is_used:
        with pytest.raises(DatasetError, match="is damaged"):
            read_clip(video, ClipSampler(3), start)
    else:
        assert numbers(read_clip(video, ClipSampler(3), start)) == [start, start + 1, start + 2]


def test_a_stream_without_times(tmp_path):
    path = write_video(tmp_path / "a.h264", 20, codec=("libx264", "yuv420p", {"bf": "2"}))
    for random_start in (False, True):
        with pytest.raises(DatasetError, match="a.h264' does not say when its frames are shown"):
            open_clips(path, path, ClipSampler(5, random_start=random_start), seeded_generator(0))


def test_a_truncated_webm_is_a_shorter_video(tmp_path):
    path = truncated(write_video(tmp_path / "a.webm", 20), 0.7)
    length = len(open_video(path).timeline().starts)
    assert 5 < length < 20 and clip_of(path, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(DatasetError, match=f"has {length} frames, and 20 are needed"):
        clip_of(path, 20)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the video is missing"),
        ({"bytes": None, "path": None}, "the video is missing"),
        (b"", "0 bytes"),
        (picture(0), "is an image, where a video is expected: .*`num_frames`"),
        ("Sure! Here is a poem about cats.", "found the text 'Sure!.*must hold videos"),
        ([{"role": "assistant", "content": "Sure!"}], "a conversation.*must hold videos"),
        ("nowhere/x.mp4", "there is no file 'nowhere/x.mp4'"),
        (7, "expected a video .*found int '7'"),
        ([], "has no frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "has no frames"),
        (np.zeros((4, 8, 8, 3), np.float32), r"an array of float32.*must be of uint8"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"of the shape \(4, 3, 8, 8\)"),
        ([[1, 2], [3]], "no regular array"),
        ([[[[300, 0, 0]]]], "integers from 0 to 255.*0 to 300"),
        ([[[[-1, 0, 0]]]], "integers from 0 to 255.*-1 to 0"),
        ([[[[0.2, 0.5, 1.0]]]], "integers from 0 to 255.*float64.*multiply by 255"),
        ([[[[True, False, True]]]], "integers from 0 to 255.*bool"),
        ([[]], "integers from 0 to 255"),
        ([picture(0), picture(1, 8, 8)], r"frames of different sizes .*\(8, 8\), \(40, 30\)"),
        ([picture(0), b"broken"], "frame 1: not an image"),
        ([picture(0), None], "frame 1: the image is missing"),
    ],
)
def test_what_is_no_video_is_named(value: Any, message: str):
    good = [picture(seed) for seed in range(3)]
    with pytest.raises(DatasetError, match=f"(?s)^row 3, the chosen video.*{message}"):
        open_clips(value, good, ClipSampler(2), where="row 3")


@pytest.mark.parametrize("read", [open_video, lambda path: open_clips(path, path, ClipSampler(3))])
def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch, read: Callable[[Path], Any]):
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigurationError, match=r'pip install "trl-sipo\[video\]"'):
        read(path)
    frames = [grey(number) for number in range(3)]
    assert numbers(open_clips(frames, frames, ClipSampler(3))[0]) == [0, 1, 2]  # needs none


def test_a_file_in_deep_folders_is_named_to_its_end(tmp_path):
    path = tmp_path / ("deep " * 20) / "clip 07.mp4"
    path.parent.mkdir()
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="clip 07.mp4' is empty"):
        open_clips(path, path, ClipSampler(5), where="row 3")
