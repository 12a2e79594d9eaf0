# SPDX-License-Identifier: Apache-2.0
"""Pairs of videos through the data layer: loading, checking, items, batches."""

import json
import logging
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Video
from PIL import Image
from torch.utils.data import DataLoader

from tests.data.clips import (
    MPEG4,
    damaged,
    grey,
    numbers,
    write_animation,
    write_folder,
    write_frames,
    write_video,
)
from tests.data.pictures import canonical, encoded, picture
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset, pair_fingerprint
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.validation import check_preference_dataset
from trl_sipo.data.video import ClipSampler, open_clips
from trl_sipo.errors import ConfigurationError, DatasetError

CLIP = ClipSampler(5)
CENTRE = PairedTransform((16, 24))
RANDOM = PairedTransform((16, 24), center_crop=False, random_flip=True)
RANDOM_CLIP = ClipSampler(5, random_start=True)


def video_pairs(folder: Path, count: int = 3, **columns: Any) -> Dataset:
    """Pairs of MP4 (12 frames) and WebM (14 frames)."""
    return Dataset.from_dict(
        {
            "prompt": [f"prompt {row}" for row in range(count)],
            "chosen": [str(write_video(folder / f"chosen {row}.mp4", 12, first=row)) for row in range(count)],
            "rejected": [str(write_video(folder / f"rejected {row}.webm", 14, first=row)) for row in range(count)],
            **columns,
        }
    )


def frame_numbers(pixels: torch.Tensor) -> list[int]:
    """The numbers of the frames of (3, F, H, W)."""
    return numbers(Image.fromarray(frame) for frame in ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).byte().numpy())


def loader(dataset: Any, **options: Any) -> DataLoader:
    return DataLoader(dataset, collate_fn=DataCollatorForDiffusionPreference(), **options)


def by_prompt(batches: Any) -> dict[str, torch.Tensor]:
    arms: dict[str, torch.Tensor] = {}
    for batch in batches:
        pairs = torch.stack([batch["chosen_pixels"], batch["rejected_pixels"]], dim=1)
        arms.update(zip(batch["prompt"], pairs, strict=True))
    return arms


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for prompt, pair in first.items():
        assert torch.equal(pair, second[prompt]), prompt


# --- items and batches


def test_items_and_batches(tmp_path):
    dataset = PreferenceDataset(video_pairs(tmp_path), transform=CENTRE, clip=CLIP)
    item = dataset[1]
    assert item.keys() == {"prompt", "chosen_pixels", "rejected_pixels", "frame_rate", "pair_index"}
    assert item["chosen_pixels"].shape == item["rejected_pixels"].shape == (3, 5, 16, 24)
    assert item["chosen_pixels"].dtype == torch.float32 and item["chosen_pixels"].abs().max() <= 1
    assert frame_numbers(item["chosen_pixels"]) == frame_numbers(item["rejected_pixels"]) == [1, 2, 3, 4, 5]
    assert item["frame_rate"] == 24.0 and isinstance(item["frame_rate"], float)
    (batch,) = loader(dataset, batch_size=3)
    assert batch["chosen_pixels"].shape == (3, 3, 5, 16, 24)
    assert batch["frame_rate"].dtype == torch.float32 and batch["frame_rate"].tolist() == [24.0] * 3
    assert torch.equal(batch["rejected_pixels"][1], item["rejected_pixels"])


def test_frame_rate_of_the_items_is_that_of_the_clip(tmp_path):
    dataset = PreferenceDataset(video_pairs(tmp_path), transform=CENTRE, clip=ClipSampler(3, frame_rate=8))
    assert dataset[0]["frame_rate"] == 8.0
    assert frame_numbers(dataset[0]["chosen_pixels"]) == frame_numbers(dataset[0]["rejected_pixels"]) == [0, 3, 6]


def test_start_crop_and_flip_are_the_same_for_both_arms(tmp_path):
    """Both arms are the same noise, so that whatever differs between them shows."""
    frames = [picture(seed, 60, 25) for seed in range(9)]
    rows = Dataset.from_dict({"prompt": ["a"] * 12, "chosen": [frames] * 12, "rejected": [frames] * 12})
    dataset = PreferenceDataset(rows, transform=RANDOM, clip=RANDOM_CLIP)
    clips = []
    for item in dataset:
        assert torch.equal(item["chosen_pixels"], item["rejected_pixels"])
        clips.append(item["chosen_pixels"].numpy().tobytes())
    assert len(set(clips)) == 12
    dataset.set_epoch(1)
    assert dataset[0]["chosen_pixels"].numpy().tobytes() not in clips


def test_a_random_start_leaves_the_crops_and_flips_as_they_are(tmp_path):
    frames = [picture(7, 60, 25)] * 9
    rows = Dataset.from_dict({"prompt": ["a"] * 6, "chosen": [frames] * 6, "rejected": [frames] * 6})
    fixed = PreferenceDataset(rows, transform=RANDOM, clip=CLIP)
    drawn = PreferenceDataset(rows, transform=RANDOM, clip=RANDOM_CLIP)
    for first, second in zip(fixed, drawn, strict=True):
        assert torch.equal(first["chosen_pixels"], second["chosen_pixels"])


def test_workers_batch_size_and_order_change_nothing(tmp_path):
    dataset = PreferenceDataset(video_pairs(tmp_path, 5), transform=RANDOM, seed=3, clip=RANDOM_CLIP)
    dataset.set_epoch(2)
    expected = by_prompt(loader(dataset))
    assert_same(by_prompt(loader(dataset, batch_size=2, num_workers=2)), expected)
    backwards = torch.utils.data.Subset(dataset, [4, 3, 2, 1, 0])
    assert_same(by_prompt(loader(backwards, batch_size=5)), expected)
    assert_same(by_prompt(loader(pickle.loads(pickle.dumps(dataset)))), expected)


def test_a_stream_does_not_depend_on_workers(tmp_path):
    rows = video_pairs(tmp_path, 4).to_iterable_dataset(num_shards=4)
    dataset = StreamingPreferenceDataset(rows, transform=RANDOM, seed=3, clip=RANDOM_CLIP)
    expected = by_prompt(loader(dataset))
    assert len(expected) == 4 and expected["prompt 0"].shape == (2, 3, 5, 16, 24)
    assert_same(by_prompt(loader(dataset, batch_size=2, num_workers=2)), expected)


@pytest.mark.parametrize("clip", [None, ClipSampler(1), ClipSampler(1, random_start=True)])
def test_one_frame_reads_images_as_ever(clip):
    expected = PreferenceDataset(canonical(3), transform=RANDOM, seed=1)
    dataset = PreferenceDataset(canonical(3), transform=RANDOM, seed=1, clip=clip)
    for first, second in zip(expected, dataset, strict=True):
        assert first.keys() == second.keys() == {"prompt", "chosen_pixels", "rejected_pixels", "pair_index"}
        assert torch.equal(first["chosen_pixels"], second["chosen_pixels"])


def test_latents_need_no_clip():
    rows = Dataset.from_dict({"prompt": ["a"], "chosen_latents": [[1.0]], "rejected_latents": [[2.0]]})
    assert PreferenceDataset(rows, clip=CLIP)[0]["chosen_latents"].tolist() == [1.0]
    assert "frame_rates" not in check_preference_dataset(rows, clip=CLIP)


def test_videos_need_a_transform(tmp_path):
    with pytest.raises(ConfigurationError, match="images and videos need a transform"):
        PreferenceDataset(video_pairs(tmp_path, 1), clip=CLIP)


def video_values(folder: Path) -> dict[str, Any]:
    path = write_video(folder / "a.mp4")
    return {
        "path": str(path),
        "bytes": path.read_bytes(),
        "dict": {"bytes": path.read_bytes(), "path": None},
        "webm": write_video(folder / "a.webm").read_bytes(),
        "avi": write_video(folder / "a.avi").read_bytes(),
        "folder": str(write_folder(folder / "frames")),
        "list": [encoded(grey(0)), encoded(grey(1))],
    }


@pytest.mark.parametrize("kind", ["path", "bytes", "dict", "webm", "avi", "folder", "list"])
def test_a_video_in_the_place_of_an_image_says_so(tmp_path, kind):
    value = video_values(tmp_path)[kind]
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": [value], "rejected": [value]})
    dataset = PreferenceDataset(rows, transform=CENTRE)
    with pytest.raises(
        DatasetError, match="row 0, the chosen image.*where an image is expected.*`num_frames` above 1"
    ):
        dataset[0]
    with pytest.raises(DatasetError, match="where an image is expected.*`num_frames` above 1"):
        check_preference_dataset(rows)
    assert PreferenceDataset(rows, transform=CENTRE, clip=ClipSampler(2))[0]["chosen_pixels"].shape == (3, 2, 16, 24)


def test_an_image_in_the_place_of_a_video_says_so():
    message = "row 0, the chosen video is an image, where a video is expected.*`num_frames`"
    with pytest.raises(DatasetError, match=message):
        PreferenceDataset(canonical(1), transform=CENTRE, clip=CLIP)[0]
    with pytest.raises(DatasetError, match=message):
        check_preference_dataset(canonical(1), clip=CLIP)


def test_fingerprints_tell_lists_of_frames_apart(tmp_path):
    def fingerprint(chosen: Any) -> int:
        return pair_fingerprint({"prompt": "a", "chosen": chosen, "rejected": b""})

    lists = [["a.png", "b.png"], ["a.pn", "gb.png"], ["b.png", "a.png"], [b"a", b"b"], [picture(0)], [picture(1)]]
    assert len({fingerprint(value) for value in lists}) == len(lists)
    assert fingerprint([{"bytes": b"a", "path": "x"}]) == fingerprint([b"a"])
    assert fingerprint(np.zeros((2, 4, 4, 3), np.uint8)) != fingerprint(np.ones((2, 4, 4, 3), np.uint8))


def test_a_clip_is_hashed_as_it_is_and_latents_as_they_were():
    clip = np.zeros((8, 128, 128, 3), np.uint8)
    tracemalloc.start()
    pair_fingerprint({"prompt": "a", "chosen": clip, "rejected": torch.from_numpy(clip)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * clip.nbytes  # a copy of either arm; float32 would be four of each
    latents = (np.arange(24, dtype=np.float32) / 7).reshape(2, 3, 4)
    for stored in (latents, latents.tolist(), latents.astype(np.float64), torch.from_numpy(latents)):
        fingerprint = pair_fingerprint({"prompt": "a", "chosen": stored, "rejected": stored})
        assert fingerprint == 7388675375532115069  # it chooses the noise: published runs depend on it


# --- checking


def test_report(tmp_path, caplog):
    rows = video_pairs(tmp_path, 3, label=[1.0, 0.5, 1.0])
    for row in range(3):
        write_video(tmp_path / f"rejected {row}.webm", 14, first=5)  # unlike the chosen ones
    report = check_preference_dataset(rows, clip=CLIP)
    assert report == {
        "format": "canonical",
        "streaming": False,
        "num_rows": 3,
        "num_ties": 1,
        "num_unlabelled": 0,
        "num_swapped": 0,
        "num_pairs": 2,
        "num_checked": 2,
        "num_identical_arms": 0,
        "num_unequal_sizes": 0,
        "smallest_side": 24,
        "shortest_frames": 12,
        "longest_frames": 14,
        "frame_rates": {24.0: 4},
        "num_irregular": 0,
        "num_decoded": 2,
    }
    assert not caplog.records
    at_rate = check_preference_dataset(rows, clip=ClipSampler(4, frame_rate=8))
    assert (at_rate["shortest_frames"], at_rate["longest_frames"], at_rate["frame_rates"]) == (4, 5, {24.0: 4})
    stream = check_preference_dataset(rows.to_iterable_dataset(), clip=CLIP)
    assert stream == {**report, "streaming": True}
    assert set(check_preference_dataset(canonical(1), clip=ClipSampler(1))) == set(report) - {
        "shortest_frames",
        "longest_frames",
        "frame_rates",
        "num_irregular",
        "num_decoded",
    }


def test_broken_and_short_files_are_named_all_together(tmp_path):
    rows = video_pairs(tmp_path, 6)
    write_video(tmp_path / "chosen 0.mp4", 4)
    write_video(tmp_path / "rejected 0.webm", 3)
    (tmp_path / "chosen 2.mp4").write_bytes(b"no video")
    write_video(tmp_path / "rejected 4.webm", 12, rate=30)
    with pytest.raises(DatasetError) as caught:
        check_preference_dataset(rows, clip=CLIP)
    first, *problems = str(caught.value).splitlines()
    assert first == "4 problem(s) in the preference data:"
    for problem, words in zip(
        problems,
        (
            ("row 0, the chosen video", "chosen 0.mp4' is too short: it has 4 frames, and 5 are needed"),
            ("row 0, the rejected video", "rejected 0.webm' is too short: it has 3 frames, and 5 are needed"),
            ("row 2, the chosen video", "chosen 2.mp4' is broken"),
            ("row 4: the chosen video has 24 frames per second and the rejected one 30", "`frame_rate`"),
        ),
        strict=True,
    ):
        assert all(word in problem for word in words), problem


def test_missing_and_empty_files_are_found_without_opening(tmp_path):
    rows = video_pairs(tmp_path, 4)
    (tmp_path / "chosen 1.mp4").unlink()
    (tmp_path / "rejected 3.webm").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"(?s)2 problem.*there is no file.*chosen 1.mp4.*3.webm' is empty"):
        check_preference_dataset(rows, num_checked_images=0, clip=CLIP)
    stored = Dataset.from_dict({"prompt": ["a"], "chosen": [b""], "rejected": [b"x"]})
    with pytest.raises(DatasetError, match="row 0, column 'chosen': the video is empty"):
        check_preference_dataset(stored, num_checked_images=0, clip=CLIP)


def test_the_end_is_checked_where_a_clip_may_come_from_it(tmp_path):
    rows = video_pairs(tmp_path, 1)
    write_frames(tmp_path / "chosen 0.mp4", [picture(seed, 64, 64) for seed in range(20)], codec=MPEG4)
    damaged(tmp_path / "chosen 0.mp4", 0.9, 0.95)
    assert check_preference_dataset(rows, clip=CLIP)["num_checked"] == 1
    with pytest.raises(DatasetError, match="row 0, the chosen video.*chosen 0.mp4' is broken"):
        check_preference_dataset(rows, clip=RANDOM_CLIP)


def _is_refused(rows: Dataset, **options: Any) -> bool:
    try:
        check_preference_dataset(rows, clip=CLIP, **options)
    except DatasetError:
        return True
    return False


def test_most_videos_are_known_by_their_index_and_some_decoded(tmp_path):
    """An index costs milliseconds, and tells what is short, of another rate or no video; decoding tells the rest."""
    frames = [picture(seed, 64, 64) for seed in range(20)]
    whole, broken = (write_frames(tmp_path / name, frames, codec=MPEG4) for name in ("a.mp4", "b.mp4"))
    damaged(broken, 0.1, 0.9)
    refused = []
    for row in range(5):
        chosen = [str(broken if row == other else whole) for other in range(5)]
        rows = Dataset.from_dict({"prompt": ["a"] * 5, "chosen": chosen, "rejected": [str(whole)] * 5})
        refused.append(_is_refused(rows, num_decoded_videos=3))
        assert _is_refused(rows)
        if not refused[-1]:
            report = check_preference_dataset(rows, num_decoded_videos=3, clip=CLIP)
            assert (report["num_checked"], report["num_decoded"], report["num_identical_arms"]) == (5, 3, 3)
            assert (report["shortest_frames"], report["frame_rates"], report["smallest_side"]) == (20, {24.0: 10}, 64)
    assert refused == [True, False, True, False, True]  # evenly spaced
    for num_frames, rate in ((4, 24), (12, 30)):
        write_video(tmp_path / "c.mp4", num_frames, rate=rate)
        odd = {"prompt": ["a"] * 3, "chosen": [str(tmp_path / "c.mp4")] * 3, "rejected": [str(whole)] * 3}
        assert _is_refused(Dataset.from_dict(odd), num_decoded_videos=0)


def test_what_makes_no_sense_is_warned_about(tmp_path, caplog):
    path = str(write_animation(tmp_path / "a.gif", [100, 100, 500, 100, 50, 100]))
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": [path], "rejected": [path]})
    with caplog.at_level(logging.WARNING, logger="trl_sipo"):
        report = check_preference_dataset(rows, clip=CLIP)
    assert (report["num_identical_arms"], report["num_irregular"]) == (1, 2)
    assert "same picture or video" in caplog.text and "Set `frame_rate`" in caplog.text
    caplog.clear()
    check_preference_dataset(rows, clip=ClipSampler(5, frame_rate=10))
    assert "Set `frame_rate`" not in caplog.text


# --- loading


@pytest.mark.parametrize("decode", [True, False])
def test_columns_of_videos_need_no_decoder_of_datasets(tmp_path, decode):
    rows = video_pairs(tmp_path, 2)
    expected = by_prompt(loader(PreferenceDataset(rows, transform=CENTRE, clip=CLIP)))
    for column in ("chosen", "rejected"):
        rows = rows.cast_column(column, Video(decode=decode))
    rows.save_to_disk(str(tmp_path / "saved"))
    for dataset in (rows, load_preference_dataset(tmp_path / "saved")):
        assert check_preference_dataset(dataset, clip=CLIP)["num_checked"] == 2
        assert_same(by_prompt(loader(PreferenceDataset(dataset, transform=CENTRE, clip=CLIP))), expected)
    stream = StreamingPreferenceDataset(rows.to_iterable_dataset(), transform=CENTRE, clip=CLIP)
    assert_same(by_prompt(loader(stream)), expected)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_paths_in_a_table_are_relative_to_its_folder(tmp_path, monkeypatch, suffix, streaming):
    video_pairs(tmp_path / "data" / "clips", 2)
    lines = [("prompt", "chosen", "rejected")]
    lines += [(f"prompt {row}", f"clips/chosen {row}.mp4", f"clips/rejected {row}.webm") for row in range(2)]
    if suffix == ".csv":
        text = "\n".join(",".join(line) for line in lines)
    else:
        text = "\n".join(json.dumps(dict(zip(lines[0], line, strict=True))) for line in lines[1:])
    (tmp_path / "data" / f"pairs{suffix}").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    dataset = load_preference_dataset(f"data/pairs{suffix}", streaming=streaming)
    kind = StreamingPreferenceDataset if streaming else PreferenceDataset
    items = list(kind(dataset, transform=CENTRE, clip=CLIP))
    assert [frame_numbers(item["rejected_pixels"])[0] for item in items] == [0, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_and_folders_of_frames_in_a_table(tmp_path, monkeypatch, streaming):
    write_folder(tmp_path / "data" / "my frames")
    row = {"prompt": "a", "chosen": [f"my frames/{number}.png" for number in range(8)], "rejected": "my frames"}
    (tmp_path / "data" / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    dataset = load_preference_dataset("data/pairs.jsonl", streaming=streaming)
    kind = StreamingPreferenceDataset if streaming else PreferenceDataset
    (item,) = kind(dataset, transform=CENTRE, clip=CLIP)
    assert frame_numbers(item["chosen_pixels"]) == frame_numbers(item["rejected_pixels"]) == [0, 1, 2, 3, 4]
    assert check_preference_dataset(dataset, clip=CLIP)["num_checked"] == 1


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl"])
def test_folders_of_pairs(tmp_path, metadata):
    for arm in ("chosen", "rejected"):
        write_video(tmp_path / arm / "0001.mp4", 8)
        write_video(tmp_path / arm / "0002.webm", 8, first=2)
        write_folder(tmp_path / arm / "v1.0003")
        write_animation(tmp_path / arm / "0004.gif", [40] * 8)
    rows = [("0001", "one"), ("0002.webm", "two"), ("v1.0003", "three"), ("clips/0004.gif", "four")]
    if metadata.endswith(".csv"):
        text = "file_name,prompt\n" + "".join(f"{name},{prompt}\n" for name, prompt in rows)
    else:
        text = "".join(json.dumps({"id": name, "prompt": prompt}) + "\n" for name, prompt in rows)
    (tmp_path / metadata).write_text(text)
    dataset = load_preference_dataset(tmp_path)
    items = list(PreferenceDataset(dataset, transform=CENTRE, clip=CLIP))
    assert [item["prompt"] for item in items] == ["one", "two", "three", "four"]
    assert [frame_numbers(item["chosen_pixels"])[0] for item in items] == [0, 2, 0, 0]
    assert [item["frame_rate"] for item in items] == [24.0, 24.0, 24.0, 25.0]
    (tmp_path / "rejected" / "0002.webm").unlink()
    (tmp_path / "chosen" / "notes").mkdir()  # a folder without frames is no video
    with pytest.raises(DatasetError, match=r"partners: rejected/ has nothing for \['0002'\]$"):
        load_preference_dataset(tmp_path)


def test_frames_as_an_array_in_a_table(tmp_path):
    array = np.stack([np.asarray(grey(number, (8, 8))) for number in range(6)])
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": [array], "rejected": [array]})
    for dataset in (rows, rows.with_format("numpy")):
        item = PreferenceDataset(dataset, transform=PairedTransform(8), clip=CLIP)[0]
        assert frame_numbers(item["chosen_pixels"]) == [0, 1, 2, 3, 4]


def test_an_array_of_floats_in_a_table_is_refused_before_training():
    array = np.random.default_rng(0).random((6, 8, 8, 3))
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": [array], "rejected": [array]})
    with pytest.raises(DatasetError, match="row 0, the chosen video is no regular array of integers .*multiply by"):
        check_preference_dataset(rows, clip=CLIP)


def test_the_order_of_draws_is_start_then_crop(tmp_path):
    """What is drawn for a pair is part of the published results: it must not change."""
    path = write_video(tmp_path / "a.mp4", 20)
    generator = torch.Generator().manual_seed(0)
    first, _, _ = open_clips(path, path, RANDOM_CLIP, generator)
    draws = torch.rand(2, generator=torch.Generator().manual_seed(0))
    assert numbers(first)[0] == int(draws[0] * 16)
    assert torch.rand((), generator=generator) == draws[1]
