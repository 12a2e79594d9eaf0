# SPDX-License-Identifier: Apache-2.0
"""Samples of one arm: from rows of single images, and from pairs that are taken apart."""

import datasets
import pytest
import torch

from tests.data.clips import grey
from tests.data.pictures import canonical, pick_a_pic, picture
from trl_sipo.data.formats import detect_format
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.validation import check_preference_dataset
from trl_sipo.data.video import ClipSampler
from trl_sipo.errors import DatasetError

TRANSFORM = PairedTransform(24)
RANDOM = PairedTransform(24, center_crop=False, random_flip=True)


def _images(labels=None, count=4):
    columns = {"prompt": [f"prompt {i}" for i in range(count)], "image": [picture(i) for i in range(count)]}
    return datasets.Dataset.from_dict(columns | ({} if labels is None else {"label": labels}))


def _samples(dataset, arms, transform=TRANSFORM):
    prepared = PreferenceDataset(dataset, detect_format(dataset.column_names, arms), transform)
    return [prepared[index] for index in range(len(prepared))]


def _pixels(seed):
    return TRANSFORM.centred(picture(seed))


def test_images_are_the_chosen_arm():
    samples = _samples(_images(), "chosen")
    assert len(samples) == 4 and all(sample.keys() == {"prompt", "chosen_pixels", "pair_index"} for sample in samples)
    for index, sample in enumerate(samples):
        assert sample["pair_index"] == index and torch.equal(sample["chosen_pixels"], _pixels(index))


@pytest.mark.parametrize("labels", [[True, False, True, None], [1, 0, 1, None], [0.8, 0.2, 0.9, 0.5]], ids=str)
def test_a_label_says_which_images_are_liked(labels):
    """A tie and a row that nobody has judged are left out; to imitate, only the liked ones are taken."""
    liked = _samples(_images(labels), "chosen")
    assert [sample["prompt"] for sample in liked] == ["prompt 0", "prompt 2"] and "label" not in liked[0]
    each = _samples(_images(labels), "each")
    assert [(sample["prompt"], sample["label"]) for sample in each] == [
        ("prompt 0", 1.0), ("prompt 1", 0.0), ("prompt 2", 1.0)
    ]  # fmt: skip


def test_pairs_are_taken_apart():
    chosen = _samples(canonical(3), "chosen")
    assert [sample.keys() for sample in chosen] == [{"prompt", "chosen_pixels", "pair_index"}] * 3
    assert all(torch.equal(sample["chosen_pixels"], _pixels(2 * i)) for i, sample in enumerate(chosen))
    each = _samples(canonical(3), "each")
    assert [(sample["pair_index"], sample["label"]) for sample in each] == [(i, 1.0 - i % 2) for i in range(6)]
    assert all(torch.equal(sample["chosen_pixels"], _pixels(i)) for i, sample in enumerate(each))


def test_the_preferred_arm_is_the_liked_one_wherever_it_stands():
    pairs, each = _samples(pick_a_pic(), "pair"), _samples(pick_a_pic(), "each")
    assert len(each) == 2 * len(pairs) == 8
    for index, pair in enumerate(pairs):
        assert torch.equal(each[2 * index]["chosen_pixels"], pair["chosen_pixels"])
        assert torch.equal(each[2 * index + 1]["chosen_pixels"], pair["rejected_pixels"])


def test_a_stream_gives_the_same_samples():
    for dataset, arms in (
        (_images([1, 0, 1, 0.5]), "each"),
        (_images([1, 0, 1, None]), "chosen"),
        (canonical(3), "each"),
    ):
        fmt = detect_format(dataset.column_names, arms)
        stream = list(StreamingPreferenceDataset(dataset.to_iterable_dataset(), fmt, TRANSFORM))
        listed = _samples(dataset, arms)
        assert len({sample["pair_index"] for sample in stream}) == len(stream) == len(listed)
        for one, other in zip(stream, listed, strict=True):
            assert one.keys() == other.keys() and one.get("label") == other.get("label")
            assert torch.equal(one["chosen_pixels"], other["chosen_pixels"])


def test_each_sample_has_a_crop_of_its_own():
    """Arms by themselves are not compared, so they need not be cropped alike; and they are alike each time."""
    first, again = (_samples(canonical(4), "each", RANDOM) for _ in range(2))
    assert all(torch.equal(a["chosen_pixels"], b["chosen_pixels"]) for a, b in zip(first, again, strict=True))


def test_prepared_data_is_taken_apart_as_well():
    dataset = canonical(3)
    for prepared in (
        PreferenceDataset(dataset, transform=TRANSFORM),
        StreamingPreferenceDataset(dataset.to_iterable_dataset(), transform=TRANSFORM),
    ):
        assert prepared.with_arms("pair") is prepared or prepared.with_arms("pair").fmt.arms == "pair"
        samples = list(prepared.with_arms("each"))
        assert [sample["label"] for sample in samples] == [1.0, 0.0] * 3 and prepared.fmt.arms == "pair"


def test_latents_and_clips():
    latents = datasets.Dataset.from_dict(
        {"prompt": ["a", "b"], "latents": torch.randn(2, 4, 3, 3).tolist(), "label": [1, 0]}
    )
    each = _samples(latents, "each", None)
    assert each[1]["chosen_latents"].shape == (4, 3, 3) and each[1]["label"] == 0.0
    frames = {"bytes": None, "path": None}
    clip = [grey(number) for number in range(4)]
    videos = datasets.Dataset.from_dict({"prompt": ["a"], "video": [clip]})
    fmt = detect_format(videos.column_names, "chosen")
    sample = PreferenceDataset(videos, fmt, TRANSFORM, clip=ClipSampler(3))[0]
    assert sample["chosen_pixels"].shape == (3, 3, 24, 24) and sample["frame_rate"] > 0 and frames
    assert check_preference_dataset(videos, fmt, clip=ClipSampler(3))["num_decoded"] == 1


@pytest.mark.parametrize("arms", ["chosen", "each"])
def test_the_checks_count_and_name_single_images(arms):
    dataset = _images([1, 0, 1, 0.5])
    fmt = detect_format(dataset.column_names, arms)
    kept = 2 if arms == "chosen" else 3
    for data in (dataset, dataset.to_iterable_dataset()):
        report = check_preference_dataset(data, fmt)
        counts = [report[f"num_{name}"] for name in ("rows", "ties", "pairs", "checked", "swapped", "identical_arms")]
        assert counts == [4, 1, kept, kept, 0, 0] and report["num_disliked"] == (arms == "chosen")
    broken = dataset.cast_column("image", datasets.Image(decode=False))
    broken = broken.map(lambda row, i: {"image": {"bytes": b"", "path": None}} if i == 2 else row, with_indices=True)
    with pytest.raises(DatasetError, match="row 2, column 'image': the image is empty"):
        check_preference_dataset(broken, fmt)


@pytest.mark.parametrize(
    ("arms", "labels", "message"),
    [
        ("pair", None, "pairs are needed.* DiffusionSFTTrainer .* DiffusionKTOTrainer"),
        ("each", None, "give the column `label`"),
        ("each", [1, 2, 0, 1], "row 1, column 'label'"),
    ],
)
def test_images_that_do_not_do_are_refused(arms, labels, message):
    with pytest.raises(DatasetError, match=message):
        _samples(_images(labels), arms)


def test_nothing_that_is_liked_is_an_error():
    dataset = _images([0, 0, 0, 0.5])
    with pytest.raises(DatasetError, match="no pair is left .* 3 are not liked"):
        check_preference_dataset(dataset, detect_format(dataset.column_names, "chosen"))


def test_images_beside_pairs_are_left_alone():
    dataset = canonical(2, image=[picture(9)] * 2)
    assert [detect_format(dataset.column_names, arms).name for arms in ("pair", "chosen", "each")] == ["canonical"] * 3


def test_an_image_beside_pairs_may_lie_anywhere(tmp_path):
    """It is not read, so that its path is nobody's business."""
    for arm in ("chosen", "rejected"):
        picture(1).save(tmp_path / f"{arm}.png")
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected,image\na,chosen.png,rejected.png,/elsewhere/0.png\n")
    assert load_preference_dataset(tmp_path / "train.csv")[0]["image"] == "/elsewhere/0.png"
    with pytest.raises(DatasetError, match="leads out"):
        (tmp_path / "train.csv").write_text("prompt,image\na,/elsewhere/0.png\n")
        load_preference_dataset(tmp_path / "train.csv")


def test_images_load_from_a_table_with_relative_paths(tmp_path):
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    rows = "\n".join(f"a,{index}.png,{['true', 'false', 'true'][index]}" for index in range(3))
    (tmp_path / "train.csv").write_text(f"prompt,image,label\n{rows}\n")
    samples = _samples(load_preference_dataset(tmp_path / "train.csv"), "each")
    assert [sample["label"] for sample in samples] == [1.0, 0.0, 1.0]
    assert torch.equal(samples[2]["chosen_pixels"], _pixels(2))
