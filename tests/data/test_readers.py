# SPDX-License-Identifier: Apache-2.0
"""Published datasets in their true layouts, from files on disk to the pixels of a pair."""

import io
import json
import tarfile

import pytest
import torch
from datasets import Dataset, Image, IterableDataset

from tests.data.clips import write_video
from tests.data.pictures import canonical, encoded, pick_a_pic, picture
from trl_sipo.data.formats import FORMATS, detect_format, select_pairs
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset
from trl_sipo.data.readers import READERS, read_source
from trl_sipo.data.readers.hpdv2 import choice_pairs, ranking_pairs
from trl_sipo.data.readers.hpdv3 import confidence_pair
from trl_sipo.data.readers.rapidata import vote_share
from trl_sipo.data.readers.tar_shards import tar_samples
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.validation import check_preference_dataset
from trl_sipo.data.video import ClipSampler
from trl_sipo.errors import ConfigurationError, DatasetError

both = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


def pairs_of(dataset, *, soft=False):
    """(prompt, chosen pixels, rejected pixels, label) of every pair, as training gets them."""
    fmt = detect_format(dataset.column_names)
    kind = StreamingPreferenceDataset if isinstance(dataset, IterableDataset) else PreferenceDataset
    prepared = kind(dataset, fmt.with_soft_labels() if soft else fmt, PairedTransform(30))
    items = list(prepared) if isinstance(dataset, IterableDataset) else [prepared[i] for i in range(len(prepared))]
    return [(item["prompt"], item["chosen_pixels"], item["rejected_pixels"], item.get("label")) for item in items]


def expected(*rows):
    """The same from (prompt, seed of chosen, seed of rejected, label)."""
    transform, generator = PairedTransform(30), torch.Generator()
    return [
        (prompt, *transform(picture(chosen), picture(rejected), generator), label)
        for prompt, chosen, rejected, label in rows
    ]


def assert_same(found, wanted):
    assert [(prompt, label) for prompt, _, _, label in found] == [(prompt, label) for prompt, _, _, label in wanted]
    for left, right in zip(found, wanted, strict=True):
        assert torch.equal(left[1], right[1]) and torch.equal(left[2], right[2])


def save_pictures(folder, *seeds):
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        picture(seed).save(folder / f"{seed}.png")


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# --- Pick-a-Pic


def pick_a_pic_members(*rows):
    """Files of shards as the copy of Pick-a-Pic has them, from (key, caption, first seed, second seed, label)."""
    members = {}
    for key, caption, first, second, label in rows:
        members[f"{key}.jpg_0.jpg"] = encoded(picture(first))
        members[f"{key}.jpg_1.jpg"] = encoded(picture(second))
        members[f"{key}.label_0.txt"] = str(label).encode()
        members[f"{key}.label_1.txt"] = str(1 - label).encode()
        members[f"{key}.original_prompt.txt"] = caption.encode()
    return members


@pytest.fixture
def pick_a_pic_shards(tmp_path):
    rows = [("00", "a cat", 0, 1, 1.0), ("01", "ein Bär", 2, 3, 0.0), ("02", "tie", 4, 5, 0.5)]
    write_tar(tmp_path / "train-00000-of-00002.tar", pick_a_pic_members(*rows))
    write_tar(tmp_path / "train-00001-of-00002.tar", pick_a_pic_members(("03", "a dog", 6, 7, 1.0)))
    return tmp_path


@both
def test_pick_a_pic_in_tar_shards(pick_a_pic_shards, streaming):
    dataset = load_preference_dataset(pick_a_pic_shards, streaming=streaming)
    assert (
        isinstance(dataset, IterableDataset) is streaming and detect_format(dataset.column_names).name == "pick_a_pic"
    )
    rows = [("a cat", 0, 1, None), ("ein Bär", 3, 2, None), ("a dog", 6, 7, None)]
    assert_same(pairs_of(dataset), expected(*rows))
    if not streaming:
        assert select_pairs(dataset, detect_format(dataset.column_names)).num_ties == 1


def test_streamed_shards_are_shared_among_workers(pick_a_pic_shards):
    assert load_preference_dataset(pick_a_pic_shards, streaming=True).num_shards == 2


def test_a_shard_that_changed_is_read_anew(pick_a_pic_shards):
    assert len(load_preference_dataset(pick_a_pic_shards)) == 4
    write_tar(
        pick_a_pic_shards / "train-00001-of-00002.tar", pick_a_pic_members(("9", "a", 1, 2, 1), ("8", "b", 1, 2, 1))
    )
    assert len(load_preference_dataset(pick_a_pic_shards)) == 5


def test_as_datasets_itself_loads_the_shards(pick_a_pic_shards):
    """Rows of `datasets`' own loader, which a hub id goes through."""
    import datasets

    files = sorted(map(str, pick_a_pic_shards.glob("*.tar")))
    dataset = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    rows = [("a cat", 0, 1, None), ("ein Bär", 3, 2, None), ("a dog", 6, 7, None)]
    assert_same(pairs_of(read_source(dataset)), expected(*rows))


@both
def test_a_missing_file_of_a_shard_is_a_bad_row(tmp_path, streaming):
    members = pick_a_pic_members(("00", "a cat", 0, 1, 1.0), ("01", "a dog", 2, 3, 1.0))
    del members["01.jpg_1.jpg"]
    dataset = load_preference_dataset(write_tar(tmp_path / "shard.tar", members), streaming=streaming)
    with pytest.raises(DatasetError, match="row 1, .*jpg_1.*missing|row 1, the rejected image: the image is missing"):
        check_preference_dataset(dataset)


@pytest.mark.parametrize("cut", [10, 700, 2048, "boundary"])
def test_a_shard_that_was_cut_off_is_named(tmp_path, cut):
    whole = write_tar(tmp_path / "whole.tar", pick_a_pic_members(("00", "a cat", 0, 1, 1.0))).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmembers()[-1]
    broken = tmp_path / "broken.tar"
    broken.write_bytes(whole[: last.offset if cut == "boundary" else cut])
    with pytest.raises(DatasetError, match="broken.tar"):
        list(tar_samples(broken))


def test_what_is_no_shard_is_named(tmp_path):
    with pytest.raises(DatasetError, match="no suffix"):
        list(tar_samples(write_tar(tmp_path / "a.tar", {"README": b"x"})))
    with pytest.raises(DatasetError, match="is empty"):
        load_preference_dataset(write_tar(tmp_path / "b.tar", {}))
    with pytest.raises(DatasetError, match="the first row not"):
        list(
            load_preference_dataset(write_tar(tmp_path / "c.tar", {"0.a.txt": b"x", "1.b.txt": b"y"}), streaming=True)
        )


# --- HPDv2 and HPDv3


@pytest.mark.parametrize(
    ("read", "record", "message"),
    [
        (choice_pairs, {"file_path": ["a", "b"], "human_preference": ["1", "0"]}, r"\['1', '0'\]: one number"),
        (choice_pairs, {"file_path": None, "human_preference": None}, "'human_preference' is None: one number"),
        (ranking_pairs, {"image_path": ["a", "b"], "rank": None}, "'rank' is None: one number"),
        (confidence_pair, {"path1": "a", "path2": "b", "confidence": "0.9"}, "confidence '0.9' is no number"),
    ],
)
def test_texts_and_nulls_in_place_of_numbers_are_refused(read, record, message):
    with pytest.raises(DatasetError, match=message):
        read({"prompt": "p", **record})


def test_hpdv2_choices(tmp_path):
    save_pictures(tmp_path / "train", 0, 1, 2, 3)
    records = [
        {"human_preference": [0, 1], "prompt": "a cat", "file_path": ["0.png", "1.png"], "user_hash": "u"},
        {"human_preference": [1, 0], "prompt": "a dog", "file_path": ["2.png", "3.png"], "user_hash": "v"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    wanted = expected(("a cat", 1, 0, None), ("a dog", 2, 3, None))
    assert_same(pairs_of(load_preference_dataset(tmp_path)), wanted)
    assert_same(pairs_of(load_preference_dataset(tmp_path / "train.json", streaming=True)), wanted)


def test_hpdv2_rankings(tmp_path):
    save_pictures(tmp_path / "pictures", 0, 1, 2)
    record = {"prompt": "a cat", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 0, 2], "raw_annotation": []}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    dataset = load_preference_dataset(tmp_path, split="test", media_folder=tmp_path / "pictures")
    assert_same(pairs_of(dataset), expected(("a cat", 1, 0, None), ("a cat", 1, 2, None)))
    assert select_pairs(dataset, FORMATS["canonical"]).num_ties == 1
    soft = pairs_of(dataset, soft=True)
    assert [label for *_, label in soft] == [1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("choices", "pairs"),
    [([1, 0], [("a", "b", 1.0)]), ([1, 1], [("a", "b", 0.5)]), ([0, 0, 1], [("c", "a", 1.0), ("c", "b", 1.0)])],
)
def test_choices_to_pairs(choices, pairs):
    record = {"prompt": "p", "file_path": list("abc")[: len(choices)], "human_preference": choices}
    assert [(pair["chosen"], pair["rejected"], pair["label"]) for pair in choice_pairs(record)] == pairs


def test_numbers_that_do_not_belong_to_images_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="2 images, but 'rank' is"):
        ranking_pairs({"prompt": "p", "image_path": ["a", "b"], "rank": [1]})
    records = [{"prompt": "p", "file_path": ["a", "b"], "human_preference": [1, 0]}] * 2
    records.append({"prompt": "p", "file_path": ["a"], "human_preference": [1, 0]})
    (tmp_path / "train.json").write_text(json.dumps(records))
    with pytest.raises(DatasetError, match="record 2: 1 images"):
        load_preference_dataset(tmp_path)


@both
def test_hpdv3(tmp_path, streaming):
    save_pictures(tmp_path / "images", 0, 1, 2, 3)
    records = [
        {"prompt": "a cat", "path1": "images/0.png", "path2": "images/1.png", "confidence": 0.97, "model1": "x"},
        {"prompt": "a dog", "path1": "images/2.png", "path2": "images/3.png", "confidence": 0.75, "model1": "y"},
    ]
    (tmp_path / "all.json").write_text(json.dumps(records))
    dataset = load_preference_dataset(tmp_path, streaming=streaming)
    assert_same(pairs_of(dataset, soft=True), expected(("a cat", 0, 1, 0.97), ("a dog", 2, 3, 0.75)))
    certain = load_preference_dataset(tmp_path, streaming=streaming, min_confidence=0.95)
    assert_same(pairs_of(certain), expected(("a cat", 0, 1, None)))


@pytest.mark.parametrize(("confidence", "label"), [(None, 1.0), (1, 1.0), (0.3, 0.5)])
def test_the_first_path_of_hpdv3_is_never_the_rejected_one(confidence, label):
    (pair,) = confidence_pair({"prompt": "p", "path1": "a", "path2": "b", "confidence": confidence})
    assert (pair["chosen"], pair["rejected"], pair["label"]) == ("a", "b", label)


def test_a_confidence_that_is_no_probability_is_refused():
    with pytest.raises(DatasetError, match="confidence 12"):
        confidence_pair({"prompt": "p", "path1": "a", "path2": "b", "confidence": 12})


# --- Rapidata


def rapidata():
    """Images within the table, and votes: 3 to 1, 0 to 5, 2 to 2, none."""
    return Dataset.from_dict(
        {
            "prompt": ["a cat", "a dog", "tie", "nobody"],
            "image1": [picture(seed) for seed in (0, 2, 4, 6)],
            "image2": [picture(seed) for seed in (1, 3, 5, 7)],
            "votes_image1": [3, 0, 2, 0],
            "votes_image2": [1, 5, 2, 0],
            "model1": ["x"] * 4,
            "model2": ["y"] * 4,
            "detailed_results": ["{}"] * 4,
        }
    )


@both
def test_rapidata_votes_are_soft_labels(tmp_path, streaming):
    rapidata().to_parquet(tmp_path / "train.parquet")
    dataset = load_preference_dataset(tmp_path, streaming=streaming)
    wanted = expected(("a cat", 0, 1, 0.75), ("a dog", 3, 2, 1.0), ("tie", 4, 5, 0.5))
    assert_same(pairs_of(dataset, soft=True), wanted)
    assert [prompt for prompt, *_ in pairs_of(dataset)] == ["a cat", "a dog"]


CRITERIA = ("preference", "coherence", "alignment")


def rapidata_criteria(arm="image", column="weighted_results_image{}_{}", word=str):
    """The columns of the newer datasets: three criteria, of which the first prefers the first image, and so on."""
    shares = {"preference": [0.75, 0.5], "coherence": [0.2, 0.9], "alignment": [0.0, None]}
    columns = {"prompt": ["a cat", "a dog"], f"{arm}1": [picture(0), picture(2)], f"{arm}2": [picture(1), picture(3)]}
    for name in CRITERIA:
        others = [None if share is None else 1 - share for share in shares[name]]
        columns |= {column.format(1, word(name)): shares[name], column.format(2, word(name)): others}
        columns[f"detailed_results_{name}"] = ["[]", "[]"]
    return columns


@both
def test_rapidata_asks_for_one_of_several_criteria(tmp_path, streaming):
    Dataset.from_dict(rapidata_criteria()).to_parquet(tmp_path / "train.parquet")
    names = r"\['rapidata_preference', 'rapidata_alignment', 'rapidata_coherence'\]"
    with pytest.raises(DatasetError, match=f"fit the formats {names}; name one: `--dataset_format`"):
        load_preference_dataset(tmp_path, streaming=streaming)
    wanted = {
        "preference": [("a cat", 0, 1, 0.75), ("a dog", 2, 3, 0.5)],
        "coherence": [("a cat", 1, 0, 0.8), ("a dog", 2, 3, 0.9)],
        "alignment": [("a cat", 1, 0, 1.0)],
    }
    for name, rows in wanted.items():
        dataset = load_preference_dataset(tmp_path, streaming=streaming, format=f"rapidata_{name}")
        found = pairs_of(dataset, soft=True)
        assert_same([(*pair[:3], pytest.approx(pair[3])) for pair in found], expected(*rows))


def test_rapidata_of_one_criterion_is_recognised():
    columns = {key: value for key, value in rapidata_criteria().items() if "coherence" not in key}
    columns = {key: value for key, value in columns.items() if "alignment" not in key}
    assert read_source(Dataset.from_dict(columns))["label"][:] == [0.75, 0.5]


@both
def test_rapidata_of_videos(tmp_path, streaming):
    columns = rapidata_criteria("video", "weighted_results{}_{}", str.capitalize)
    for number in (1, 2):
        files = [write_video(tmp_path / f"{number}{row}.mp4", 9, first=10 * number + row) for row in range(2)]
        columns[f"video{number}"] = [file.name for file in files]
    Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    dataset = load_preference_dataset(tmp_path, streaming=streaming, format="rapidata_video_coherence")
    report = check_preference_dataset(dataset, clip=ClipSampler(5))
    assert (report["format"], report["num_pairs"], report["num_swapped"]) == ("rapidata_video", 2, 1)


def test_an_address_is_not_downloaded(tmp_path):
    columns = {"prompt": ["p"], "chosen": ["https://assets.rapidata.ai/a.jpg"], "rejected": [picture(1)]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match="'https://assets.rapidata.ai/a.jpg' is an address, and nothing is downl"):
        check_preference_dataset(load_preference_dataset(tmp_path))


def test_images_are_not_copied_for_a_label():
    dataset = rapidata()
    buffers = [
        [buffer.address for chunk in table.data.column("image1").chunks for buffer in chunk.buffers() if buffer]
        for table in (dataset, read_source(dataset))
    ]
    assert buffers[0] == buffers[1]
    assert isinstance(read_source(dataset).features["image1"], Image)


def test_votes():
    assert (vote_share(1, 3), vote_share(0, 0), vote_share(None, 2), vote_share(0.5, 1.5)) == (0.25, None, 0.0, 0.25)
    for votes in ((-1, 3), ("3", 1)):
        with pytest.raises(DatasetError, match="must be numbers that are not negative"):
            vote_share(*votes)


# --- VideoDPO


def write_video_dpo(folder, pairs=({"video1": 1, "video2": 0, "frame_caption": ["a cat"], "score": 0.4},)):
    for number in range(2):
        write_video(folder / "videos" / f"{number}.mp4", 9, first=40 * number)
    metadata = [
        {"basic": {"clip_path": f"videos/{number}.mp4", "clip_duration": 2.0}, "misc": {"frame_caption": ["a cat"]}}
        for number in range(2)
    ]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "pair.json").write_text(json.dumps(list(pairs)))
    return folder


@both
def test_video_dpo(tmp_path, streaming):
    dataset = load_preference_dataset(write_video_dpo(tmp_path), streaming=streaming)
    (row,) = list(dataset)
    assert row["prompt"] == "a cat" and row["score"] == 0.4
    assert [row[arm].rsplit("/", 1)[-1] for arm in ("chosen", "rejected")] == ["1.mp4", "0.mp4"]
    if not streaming:
        report = check_preference_dataset(dataset, clip=ClipSampler(5))
        assert (report["num_pairs"], report["shortest_frames"], report["num_identical_arms"]) == (1, 9, 0)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"video1": 2, "video2": 0, "frame_caption": "x"}, "pair 0: IndexError: .*has 2 videos, no number 2"),
        ({"video1": -1, "video2": 0, "frame_caption": "x"}, "no number -1"),
        ({"video1": 1, "frame_caption": "x"}, "pair 0: KeyError: 'video2'"),
        ("x", "pair 0: TypeError"),
    ],
)
def test_a_pair_of_video_dpo_that_names_no_video(tmp_path, pair, message):
    write_video_dpo(tmp_path, [pair])
    with pytest.raises(DatasetError, match=message):
        load_preference_dataset(tmp_path)


def test_video_dpo_tables_of_another_form(tmp_path):
    write_video_dpo(tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(DatasetError, match="metadata.json must hold a list, found dict"):
        load_preference_dataset(tmp_path)


# --- recognising and naming


def test_every_reader_is_told_by_its_columns_alone():
    for name, reader in READERS.items():
        others = [other for other in READERS if other != name and set(READERS[other].columns) <= set(reader.columns)]
        assert not others and not any(set(fmt.required_columns) <= set(reader.columns) for fmt in FORMATS.values())


def test_layouts_of_old_stay_as_they_are():
    for dataset in (canonical(2), pick_a_pic()):
        assert read_source(dataset) is dataset


def test_a_name_decides_between_two_layouts():
    both_layouts = pick_a_pic().add_column("prompt", ["p"] * 6).add_column("chosen", ["c"] * 6)
    both_layouts = both_layouts.add_column("rejected", ["r"] * 6)
    with pytest.raises(DatasetError, match="'canonical' and 'pick_a_pic'"):
        detect_format(read_source(both_layouts).column_names)
    for name in ("canonical", "pick_a_pic"):
        assert detect_format(read_source(both_layouts, name).column_names).name == name


def test_a_name_decides_between_two_sources():
    columns = {"prompt": ["p"], "path1": ["a"], "path2": ["b"], "image_path": [["c", "d"]], "rank": [[1, 0]]}
    dataset = Dataset.from_dict(columns)
    with pytest.raises(DatasetError, match="fit the formats .*'hpdv2_ranking', 'hpdv3'.*name one"):
        read_source(dataset)
    assert read_source(dataset, "hpdv3")["chosen"][:] == ["a"]
    assert read_source(dataset, "hpdv2_ranking")["chosen"][:] == ["d"]


def test_votes_that_were_counted_before_may_be_named():
    counted = read_source(rapidata(), "rapidata").remove_columns(["votes_image1", "votes_image2"])
    assert read_source(counted, "rapidata")["label"][:] == [0.75, 0.0, 0.5, None]
    with pytest.raises(DatasetError, match=r"not of the format 'rapidata': \['label'\] missing"):
        read_source(counted.remove_columns("label"), "rapidata")


def test_names_are_checked():
    with pytest.raises(DatasetError, match="unknown format 'hpdv4'.*hpdv2, .*pick_a_pic"):
        read_source(canonical(1), "hpdv4")
    with pytest.raises(DatasetError, match=r"not of the format 'hpdv3': \['path1', 'path2'\] missing"):
        read_source(canonical(1), "hpdv3")
    with pytest.raises(DatasetError, match=r"not of the format 'pick_a_pic'.*missing"):
        load_preference_dataset({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, format="pick_a_pic")


# --- rows left out


def test_listed_rows_are_left_out(tmp_path, caplog):
    canonical(4).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "bad.jsonl").write_text('{"row": 2, "reason": "x"}\n{"row": 0}\n{"row": 2}\n')
    options = {"skip_rows": tmp_path / "bad.jsonl"}
    dataset = load_preference_dataset(tmp_path / "train.parquet", **options)
    assert dataset["prompt"][:] == ["prompt 1", "prompt 3"]
    assert "Leaving out 2 of 4 rows" in caplog.text and "errors count the rows that are left" in caplog.text
    with pytest.raises(ConfigurationError, match="without their keys, which alone tell the rows of a stream"):
        load_preference_dataset(tmp_path / "train.parquet", streaming=True, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"row": 9}', "row 9 is to be skipped, but the dataset has 3 rows"),
        ('{"row": 1}\n[]', "line 2: expected"),
        ("1", "line 1: expected"),
        ('{"number": 1}', "line 1: expected"),
        ('{"row": -1}', "line 1: a row is a number from 0, found -1"),
        (None, "cannot be read"),
    ],
)
def test_a_list_of_something_else_is_refused(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DatasetError, match=message):
        load_preference_dataset(
            {"prompt": list("abc"), "chosen": list("abc"), "rejected": list("def")}, skip_rows=file
        )


def test_confident_pairs():
    columns = {"prompt": list("abcde"), "chosen": list("abcde"), "rejected": list("fghij")}
    labelled = {**columns, "label": [0.9, 0.05, 0.5, None, 0.89]}
    assert load_preference_dataset(labelled, min_confidence=0.9)["prompt"][:] == ["a", "b"]
    streamed = load_preference_dataset(labelled, min_confidence=0.9, streaming=True)
    assert [row["prompt"] for row in streamed] == ["a", "b"]
    for options, message in (
        ({"min_confidence": 0.2}, r"in \[0.5, 1\]; got 0.2"),
        ({"min_confidence": 0.9}, "needs labels"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            load_preference_dataset(columns, **options)
