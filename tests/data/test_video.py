# SPDX-License-Identifier: Apache-2.0
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.clips import (
    AV1,
    HEVC,
    MPEG4,
    SUFFIXES,
    VP8,
    clip_of,
    numbers,
    write_animation,
    write_folder,
    write_frames,
    write_video,
)
from trl_sipo.data import video_file
from trl_sipo.data.seeding import seeded_generator
from trl_sipo.data.video import DEFAULT_FRAME_RATE, ClipSampler, open_clips, open_video, read_clip
from trl_sipo.errors import ConfigurationError, DatasetError

FILES = [*((suffix, None) for suffix in SUFFIXES), (".webm", VP8), (".mp4", MPEG4), (".mp4", HEVC), (".mp4", AV1)]


# --- which frames


@pytest.mark.parametrize(("suffix", "codec"), FILES, ids=str)
def test_every_start_gives_exactly_the_frames_asked_for(tmp_path, suffix, codec):
    path = write_video(tmp_path / f"video{suffix}", 23, rate=10 if suffix == ".gif" else 24, codec=codec)
    for start in range(21):
        assert clip_of(path, 3, start) == [start, start + 1, start + 2]
    assert clip_of(path, 23) == list(range(23))
    timeline = open_video(path).timeline()
    assert len(timeline.starts) == 23 and timeline.is_regular
    assert float(timeline.end) == pytest.approx(23 / float(open_video(path).rate), abs=0.002)


def test_both_arms_give_the_same_frames(tmp_path):
    chosen = write_video(tmp_path / "chosen.mp4", 16)
    rejected = write_video(tmp_path / "rejected.webm", 25)
    starts = set()
    for seed in range(150):
        clips = open_clips(chosen, rejected, ClipSampler(5, random_start=True), seeded_generator(seed))
        first, second = numbers(clips[0]), numbers(clips[1])
        assert first == second == list(range(first[0], first[0] + 5))
        assert clips[2] == 24.0
        starts.add(first[0])
    assert starts == set(range(12))  # of the common range, 16 frames, every start and no other


def test_without_a_random_start_it_is_the_first_frames(tmp_path):
    chosen, rejected = write_video(tmp_path / "a.mp4"), write_video(tmp_path / "b.mp4", start=7)  # not at time 0
    first, second, rate = open_clips(chosen, rejected, ClipSampler(6))
    assert numbers(first) == numbers(second) == list(range(6))
    assert rate == 24.0 and isinstance(rate, float)


@pytest.mark.parametrize(
    ("rate", "frame_rate", "expected"),
    [
        (24, 24, [0, 1, 2, 3, 4, 5]),
        (24, 12, [0, 2, 4, 6, 8, 10]),
        (24, 8, [0, 3, 6, 9, 12, 15]),
        (24, 16, [0, 1, 3, 4, 6, 7]),  # of two that are as near, the earlier
        (24, 23.976, [0, 1, 2, 3, 4, 5]),
        (30, 16, [0, 2, 4, 6, 7, 9]),  # 0, 1.875, 3.75, 5.625, 7.5, 9.375
        (30, 24, [0, 1, 2, 4, 5, 6]),  # 0, 1.25, 2.5, 3.75, 5, 6.25
        (30, 12, [0, 2, 5, 7, 10, 12]),  # 2.5 and 12.5, which times in milliseconds put on either side of the middle
        (12, 24, [0, 0, 1, 1, 2, 2]),
        (30000 / 1001, 15, [0, 2, 4, 6, 8, 10]),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])  # exact times, and times in milliseconds
def test_frame_rate_takes_the_nearest_frames(tmp_path, suffix, rate, frame_rate, expected):
    path = write_video(tmp_path / f"video{suffix}", 22, rate=rate)
    assert clip_of(path, 6, frame_rate=frame_rate) == expected
    assert open_clips(path, path, ClipSampler(6, frame_rate=frame_rate))[2] == frame_rate
    for start in range(2):
        assert clip_of(path, 5, start, frame_rate=frame_rate) == expected[start : start + 5]


def test_frame_rate_shows_the_same_moments_of_arms_of_different_rates(tmp_path):
    chosen, rejected = write_video(tmp_path / "a.mp4", 28, rate=30), write_video(tmp_path / "b.webm", 14, rate=15)
    sampler = ClipSampler(4, frame_rate=7.5, random_start=True)
    starts = set()
    for seed in range(40):
        first, second, rate = open_clips(chosen, rejected, sampler, seeded_generator(seed))
        assert [number / 30 for number in numbers(first)] == [number / 15 for number in numbers(second)]
        assert rate == 7.5
        starts.add(numbers(second)[0])
    assert starts == {0, 2, 4, 6}  # 14 / 15 s are 7 frames at 7.5 per second


def test_arms_of_different_rates_need_frame_rate(tmp_path):
    chosen, rejected = write_video(tmp_path / "a.mp4", rate=24), write_video(tmp_path / "b.mp4", rate=30)
    with pytest.raises(DatasetError, match=r"row 3: the chosen video has 24 .* and the rejected one 30.*`frame_rate`"):
        open_clips(chosen, rejected, ClipSampler(4), where="row 3")
    film = write_video(tmp_path / "c.mp4", rate=24000 / 1001)
    assert open_clips(chosen, film, ClipSampler(4))[2] == 24.0


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_frames_that_stay_long(tmp_path, name):
    path = write_animation(tmp_path / name, [100, 100, 500, 100, 50, 150])
    assert clip_of(path, 6) == [0, 1, 2, 3, 4, 5]
    assert clip_of(path, 10, frame_rate=10) == [0, 1, 2, 2, 2, 2, 2, 3, 4, 5]  # the last at 0.9 s, of 0.85 .. 1.0
    assert clip_of(path, 3, 4, frame_rate=10) == [2, 2, 2]
    assert clip_of(path, 5, frame_rate=5) == [0, 2, 2, 3, 4]  # at 0.6 s frame 3, which is 0.1 s early
    timeline = open_video(path).timeline()
    assert timeline.end == 1 and not timeline.is_regular
    with pytest.raises(DatasetError, match="has 10 frames at `frame_rate` 10, and 11 are needed"):
        clip_of(path, 11, frame_rate=10)


def test_one_number_is_drawn_whether_or_not_the_start_is_random(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    states = []
    for random_start in (False, True):
        generator = seeded_generator(1)
        open_clips(path, path, ClipSampler(4, random_start=random_start), generator)
        states.append(generator.get_state())
    assert torch.equal(*states) and not torch.equal(states[0], seeded_generator(1).get_state())


def test_a_random_start_needs_a_generator(tmp_path):
    sampler = ClipSampler(4, random_start=True)
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(ConfigurationError, match="needs a torch.Generator"):
        open_clips(path, path, sampler)
    assert sampler.for_evaluation() == ClipSampler(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be a positive integer, found 0"),
        ({"num_frames": 4.0}, "num_frames"),
        ({"num_frames": True}, "num_frames"),
        ({"num_frames": 4, "frame_rate": 0}, "frame_rate must be a positive number"),
        ({"num_frames": 4, "frame_rate": float("nan")}, "frame_rate"),
        ({"num_frames": 4, "frame_rate": "24"}, "frame_rate"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ClipSampler(**options)


# --- how they are read


def test_only_what_is_needed_is_decoded_and_converted(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 28)
    video = open_video(path)
    assert len(video.timeline().starts) == 28
    decoded, converted = [], []
    decode, to_image = video_file._decode, video_file._to_image
    monkeypatch.setattr(
        video_file, "_decode", lambda *given: (decoded.append(frame.pts) or frame for frame in decode(*given))
    )
    monkeypatch.setattr(
        video_file, "_to_image", lambda frame, *given: converted.append(frame.pts) or to_image(frame, *given)
    )
    assert numbers(read_clip(video, ClipSampler(2), 22)) == [22, 23]
    assert len(converted) == 2 and len(decoded) <= 7  # of 28: key frames are at most 7 apart
    decoded.clear(), converted.clear()
    assert numbers(read_clip(video, ClipSampler(2), 0)) == [0, 1]
    assert len(converted) == len(decoded) == 2
    decoded.clear(), converted.clear()
    assert numbers(read_clip(video, ClipSampler(3, frame_rate=6), 0)) == [0, 4, 8]
    assert len(converted) == 3 and len(decoded) <= 10
    decoded.clear(), converted.clear()
    assert numbers(read_clip(video, ClipSampler(2, frame_rate=12), 11)) == [22, 24]
    assert len(converted) == 2 and len(decoded) <= 10


def test_a_seek_that_lands_too_late_is_noticed(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mkv", 20)
    points = []
    monkeypatch.setattr(video_file._Index, "seek_point", lambda self, time: points.append(time) or self.times[-1])
    assert clip_of(path, 3, 5) == [5, 6, 7]
    assert len(points) == 1


def test_frames_that_are_not_shown_do_not_count(tmp_path):
    """VP8: the header of one frame says that it is only referred to."""
    source, path = write_video(tmp_path / "source.webm", 12, codec=VP8), tmp_path / "hidden.webm"
    with av.open(str(source)) as given, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(packet for packet in given.demux(video=0) if packet.size):
            content = bytearray(bytes(packet))
            if number == 4:
                content[0] &= ~0x10
            changed = av.Packet(bytes(content))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.stream, changed.is_keyframe = stream, packet.is_keyframe
            output.mux(changed)
    shown = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert clip_of(path, 11) == shown
    assert len(open_video(path).timeline().starts) == 11
    assert [clip_of(path, 1, start)[0] for start in range(11)] == shown


def test_frames_that_an_edit_list_cuts_do_not_count(tmp_path):
    path = write_video(tmp_path / "a.mp4", 20, start=-5, container={"avoid_negative_ts": "disabled"})
    shown = list(range(5, 20))
    assert clip_of(path, 15) == shown
    assert len(open_video(path).timeline().starts) == 15
    assert [clip_of(path, 1, start)[0] for start in range(15)] == shown


@pytest.mark.parametrize("suffix", [".mov", ".mp4", ".webm"])
def test_a_file_cut_out_of_a_longer_one(tmp_path, suffix):
    """It begins at a key frame of the longer one, with frames that refer to the part before it."""
    source, path = write_video(tmp_path / f"long{suffix}", 25), tmp_path / "cut.mkv"
    with av.open(str(source)) as given, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(given.streams.video[0])
        num_keys = 0
        for packet in given.demux(video=0):
            num_keys += packet.is_keyframe
            if packet.size and num_keys > 1:
                packet.stream = stream
                output.mux(packet)
    length = len(open_video(path).timeline().starts)
    shown = list(range(25 - length, 25))
    assert 10 < length < 25 and clip_of(path, length) == shown
    assert [clip_of(path, 1, start)[0] for start in range(length)] == shown


# --- what a frame looks like


@pytest.mark.parametrize(
    "rotation", [{"degrees": 0}, {"degrees": 90}, {"degrees": 180}, {"degrees": -90}, {"degrees": 0, "hflip": True}]
)
def test_rotation_and_mirroring_are_applied(tmp_path, rotation):
    stored = np.zeros((32, 64, 3), dtype=np.uint8)
    stored[:16, :32] = 255  # the upper left quarter is white
    path = write_frames(tmp_path / "a.mp4", [Image.fromarray(stored)] * 3, rotation=rotation)
    expected = np.rot90(stored, rotation["degrees"] // 90)
    expected = expected[:, ::-1] if rotation.get("hflip") else expected
    for image in read_clip(open_video(path), ClipSampler(3)):
        found = np.asarray(image).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 4


def half_transparent() -> Image.Image:
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 255))
    image.paste((200, 0, 0, 0), (0, 0, 16, 32))
    return image


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx", "gif"])
def test_transparent_pixels_are_laid_on_white(tmp_path, codec):
    path = tmp_path / ("a.gif" if codec == "gif" else "a.webm")
    if codec == "gif":
        half_transparent().save(path, save_all=True, append_images=[half_transparent().rotate(180)], disposal=2)
    else:
        write_frames(path, [half_transparent()] * 2, codec=(codec, "yuva420p", {"auto-alt-ref": "0", "crf": "4"}))
    pixels = np.asarray(read_clip(open_video(path), ClipSampler(2))[0]).astype(int)
    assert np.abs(pixels[:, :12] - (255, 255, 255)).max() <= 3
    assert np.abs(pixels[:, 20:] - (200, 0, 0)).max() <= 6


@pytest.mark.parametrize(("colorspace", "color_range"), [(1, 1), (1, 2), (5, 1), (5, 2), (None, None)])
def test_colours(tmp_path, colorspace, color_range):
    """BT.709 and BT.601, limited and full range, as the file says; without a word, BT.601 limited."""
    path, colour = tmp_path / "a.mp4", (200, 60, 20)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=24, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        if colorspace is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), colour))
        frame = frame.reformat(format="yuv444p", dst_colorspace=colorspace or 5, dst_color_range=color_range or 1)
        frame.pts = 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    (image,) = read_clip(open_video(path), ClipSampler(1))
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 3


# --- how it is stored


@pytest.mark.parametrize(
    "store",
    [
        lambda path: path,
        str,
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: {"bytes": path.read_bytes(), "path": "not here.mp4"},
        lambda path: {"bytes": None, "path": str(path)},
    ],
    ids=["path", "str", "bytes", "bytearray", "dict bytes", "dict path"],
)
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_every_way_of_storing_a_file(tmp_path, suffix, store):
    path = tmp_path / f"a video of a cat{suffix}"  # blanks in a path do not make it a sentence
    write_animation(path, [100] * 8) if suffix == ".webp" else write_video(path, 8, rate=10)
    assert clip_of(store(path), 3, 4) == [4, 5, 6]
    assert float(open_video(store(path)).rate) == pytest.approx(10)


def paths_in(folder: Path) -> list[str]:
    return [str(folder / f"{number}.png") for number in range(12)]


@pytest.mark.parametrize(
    "store",
    [
        str,
        paths_in,
        lambda folder: [Image.open(path) for path in paths_in(folder)],
        lambda folder: [{"bytes": Path(path).read_bytes(), "path": None} for path in paths_in(folder)],
        lambda folder: np.stack([np.asarray(Image.open(path)) for path in paths_in(folder)]),
        lambda folder: torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths_in(folder)]),
        lambda folder: np.stack([np.asarray(Image.open(path)) for path in paths_in(folder)]).tolist(),
    ],
    ids=["folder", "paths", "pictures", "dicts", "array", "tensor", "nested lists"],
)
def test_frames_without_a_file(tmp_path, store):
    value = store(write_folder(tmp_path / "frames of a cat", 12))
    assert clip_of(value, 12) == list(range(12))
    assert clip_of(value, 3, 8) == [8, 9, 10]
    assert open_video(value).rate == DEFAULT_FRAME_RATE
    assert open_clips(value, value, ClipSampler(3))[2] == DEFAULT_FRAME_RATE
    first, second, rate = open_clips(value, value, ClipSampler(3, frame_rate=8))
    assert (numbers(first), rate) == ([0, 1, 2], 8.0)  # frames without a rate are of the rate that is asked for
    with pytest.raises(DatasetError, match="has 12 frames, and 13 are needed"):
        clip_of(value, 13)


def test_a_folder_may_state_its_rate(tmp_path):
    folder = write_folder(tmp_path / "frames", 12)
    (folder / "metadata.json").write_text(json.dumps({"fps": 12.5}))
    assert open_video(folder).rate == Fraction(25, 2)
    assert clip_of(folder, 6, frame_rate=6.25) == [0, 2, 4, 6, 8, 10]
    for content in ("{}", "[", '{"fps": "many"}', '{"fps": -1}', "[3]"):
        (folder / "metadata.json").write_text(content)
        with pytest.raises(DatasetError, match="frames'.*metadata.json"):
            open_video(folder)
