# SPDX-License-Identifier: Apache-2.0
import csv
import json
import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from datasets import DatasetDict, IterableDataset

from tests.data.pictures import canonical, encoded, picture
from trl_sipo.data.loading import dataset_from_columns, load_preference_dataset
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.validation import check_preference_dataset
from trl_sipo.errors import DatasetError


def prompts(dataset: Any) -> list[str]:
    return [row["prompt"] for row in dataset.select_columns("prompt")]


def first_pixels(dataset: Any) -> torch.Tensor:
    kind = StreamingPreferenceDataset if isinstance(dataset, IterableDataset) else PreferenceDataset
    item = next(iter(kind(dataset, transform=PairedTransform(30))))
    return torch.stack([item["chosen_pixels"], item["rejected_pixels"]])


EXPECTED_PIXELS = torch.stack(PairedTransform(30)(picture(0), picture(1)))


def write_table(file: Path, count: int, start: int = 0, image_folder: str = "images") -> Path:
    """A JSON Lines or CSV table of `count` pairs, with images beside it and relative paths to them."""
    (file.parent / image_folder).mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(start, start + count):
        row = {"prompt": f"prompt {number}"}
        for seed, arm in ((2 * number, "chosen"), (2 * number + 1, "rejected")):
            row[arm] = f"{image_folder}/{seed}.png"
            picture(seed).save(file.parent / row[arm])
        rows.append(row)
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_folders(root: Path, count: int = 3, metadata: str = "metadata.jsonl", key: str = "id") -> Path:
    for arm, offset in (("chosen", 0), ("rejected", 1)):
        (root / arm).mkdir(parents=True)
        for number in range(count):
            suffix = ("png", "webp")[number % 2]
            picture(2 * number + offset).save(root / arm / f"{number:04d}.{suffix}", lossless=True)
    rows = [{key: f"{number:04d}", "prompt": f"prompt {number}", "label": "1"} for number in range(count)]
    if metadata.endswith(".csv"):
        lines = [f"{key},prompt,label", *(f"{row[key]},{row['prompt']},1" for row in rows)]
    else:
        lines = [json.dumps({**row, "label": 1}) for row in rows]
    (root / metadata).write_text("\n".join(lines) + "\n")
    return root


# --- saved datasets


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_dataset(tmp_path, streaming):
    canonical(3).save_to_disk(str(tmp_path / "saved"))
    dataset = load_preference_dataset(tmp_path / "saved", streaming=streaming)
    assert isinstance(dataset, IterableDataset) is streaming
    assert prompts(dataset) == ["prompt 0", "prompt 1", "prompt 2"]
    assert torch.equal(first_pixels(dataset), EXPECTED_PIXELS)


def test_saved_splits(tmp_path):
    DatasetDict({"train": canonical(4), "validation": canonical(2)}).save_to_disk(str(tmp_path / "saved"))
    path = str(tmp_path / "saved")
    assert len(load_preference_dataset(path)) == 4
    assert len(load_preference_dataset(path, split="validation")) == 2
    assert prompts(load_preference_dataset(path, split="train[1:3]")) == ["prompt 1", "prompt 2"]
    assert len(load_preference_dataset(path, split="train[:50%]+validation")) == 4
    with pytest.raises(DatasetError, match=r"no split 'test'; it has \['train', 'validation'\]"):
        load_preference_dataset(path, split="test")


def test_a_damaged_saved_dataset(tmp_path):
    canonical(2).save_to_disk(str(tmp_path / "saved"))
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.unlink()
    with pytest.raises(DatasetError, match="saved dataset .* cannot be read"):
        load_preference_dataset(tmp_path / "saved")


# --- tables


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_paths_in_a_table_are_relative_to_its_folder(tmp_path, monkeypatch, suffix, streaming):
    file = write_table(tmp_path / "somewhere" / f"pairs{suffix}", 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for source in (file, file.parent, Path("..") / "somewhere" / file.name):
        dataset = load_preference_dataset(source, streaming=streaming)
        assert prompts(dataset) == ["prompt 0", "prompt 1"]
        assert torch.equal(first_pixels(dataset), EXPECTED_PIXELS)
        assert check_preference_dataset(dataset)["num_pairs"] == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_one_split_in_several_folders(tmp_path, streaming):
    write_table(tmp_path / "a" / "pairs.jsonl", 2)
    write_table(tmp_path / "b" / "pairs.jsonl", 2, start=2)
    write_table(tmp_path / "b" / "more.csv", 1, start=4)
    dataset = load_preference_dataset(tmp_path, streaming=streaming)
    assert sorted(prompts(dataset)) == [f"prompt {number}" for number in range(5)]
    assert check_preference_dataset(dataset)["num_checked"] == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_some_tables_only_are_not_lost(tmp_path, streaming):
    """Filled up with nulls, the rows of the first table would be dropped; in a stream the labels would go unread."""
    write_table(tmp_path / "a" / "pairs.jsonl", 2)
    rows = [{"prompt": "p", "chosen": "a.png", "rejected": "b.png", "label": 0}]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DatasetError, match=r"/a', .*/b'\] do not have the same columns: only some have \['label'\]"):
        load_preference_dataset(tmp_path, streaming=streaming)


def test_shards_that_are_missing_are_said(tmp_path, caplog):
    for number in (0, 2):
        write_table(tmp_path / f"train-{number:05d}-of-00003.jsonl", 1, start=number)
    assert len(load_preference_dataset(tmp_path)) == 2
    assert "2 of 3 shards" in caplog.text and "train-00001-of-00003" in caplog.text
    write_table(tmp_path / "train-00001-of-00003.jsonl", 1, start=1)
    caplog.clear()
    assert len(load_preference_dataset(tmp_path)) == 3 and not caplog.text


def test_absolute_paths_stay(tmp_path):
    write_table(tmp_path / "images" / "pairs.jsonl", 1)
    row = json.loads((tmp_path / "images" / "pairs.jsonl").read_text())
    absolute = {**row, **{arm: str(tmp_path / "images" / row[arm]) for arm in ("chosen", "rejected")}}
    (tmp_path / "absolute.jsonl").write_text(json.dumps(absolute))
    assert torch.equal(first_pixels(load_preference_dataset(tmp_path / "absolute.jsonl")), EXPECTED_PIXELS)


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_parquet_shards_by_split(tmp_path, streaming):
    (tmp_path / "data").mkdir()
    everything = canonical(6)
    for part in range(2):
        everything.shard(2, part, contiguous=True).to_parquet(
            str(tmp_path / f"data/train-{part:05d}-of-00002.parquet")
        )
    canonical(1).to_parquet(str(tmp_path / "data/test_unique-00000-of-00001.parquet"))
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "train.jsonl").write_text("no json")
    dataset = load_preference_dataset(tmp_path, streaming=streaming)
    assert prompts(dataset) == [f"prompt {number}" for number in range(6)]
    assert torch.equal(first_pixels(dataset), EXPECTED_PIXELS)
    assert prompts(load_preference_dataset(tmp_path, split="test_unique", streaming=streaming)) == ["prompt 0"]
    with pytest.raises(DatasetError, match=r"no split 'test'; it has \['test_unique', 'train'\]"):
        load_preference_dataset(tmp_path, split="test", streaming=streaming)


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("pairs.parquet", "train"),
        ("my-train.parquet", "train"),
        ("val.parquet", "validation"),
        ("dev_pairs.parquet", "validation"),
        ("eval.parquet", "test"),
        ("test/pairs.parquet", "test"),
        ("train/test.parquet", "test"),
        ("contest.parquet", "train"),
        ("validation_unique-00000-of-00003-abcdef.parquet", "validation_unique"),
    ],
)
def test_split_of_a_file(tmp_path, file, split):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    canonical(1).to_parquet(str(tmp_path / file))
    assert len(load_preference_dataset(tmp_path, split=split)) == 1
    with pytest.raises(DatasetError, match=f"it has \\['{split}'\\]"):
        load_preference_dataset(tmp_path, split="other")


def test_one_file_is_the_split_asked_for(tmp_path):
    canonical(4).to_parquet(str(tmp_path / "pairs.parquet"))
    assert len(load_preference_dataset(tmp_path / "pairs.parquet", split="test")) == 4
    assert prompts(load_preference_dataset(tmp_path / "pairs.parquet", split="test[-1:]")) == ["prompt 3"]


def test_name_chooses_a_folder(tmp_path):
    (tmp_path / "easy").mkdir()
    canonical(2).to_parquet(str(tmp_path / "easy" / "pairs.parquet"))
    assert len(load_preference_dataset(tmp_path, name="easy")) == 2
    with pytest.raises(DatasetError, match="name='hard'.*has no folder of that name"):
        load_preference_dataset(tmp_path, name="hard")


def test_words_of_a_csv_that_look_like_nulls_are_prompts(tmp_path):
    file = write_table(tmp_path / "pairs.csv", 3)
    file.write_text(file.read_text().replace("prompt 0", "null").replace("prompt 1", "NA").replace("prompt 2", ""))
    dataset = load_preference_dataset(file)
    assert prompts(dataset) == ["null", "NA", None]
    with pytest.raises(DatasetError, match="row 2, column 'prompt'"):
        check_preference_dataset(dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_a_csv_are_read_by_what_their_column_is(tmp_path, streaming):
    """And not by what the first ten thousand of them look like."""
    lines = ["prompt,chosen,rejected,label", "007,a.png,b.png,1", "1984,c.png,d.png,", ",e,f,True"]
    lines += ["a cat,a.png,b.png,0"] * 10_000 + ["1,a.png,b.png,0.25"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    rows = [(row["prompt"], row["label"]) for row in load_preference_dataset(tmp_path, streaming=streaming)]
    assert rows[:3] == [("007", 1.0), ("1984", None), (None, 1.0)]
    assert rows[-2:] == [("a cat", 0.0), ("1", 0.25)]


def test_text_in_place_of_paths_is_still_recognised(tmp_path):
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({"prompt": "Write!", "chosen": "Of course.", "rejected": "No way."})
    )
    with pytest.raises(DatasetError, match="found the text 'Of course.'.*must hold images"):
        check_preference_dataset(load_preference_dataset(tmp_path / "answers.jsonl"))


def test_broken_tables(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"\nnonsense')
    with pytest.raises(DatasetError, match="cannot read .*pairs.jsonl"):
        load_preference_dataset(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.parquet").write_bytes(b"no parquet")
    with pytest.raises(DatasetError, match="cannot read .*pairs.parquet"):
        load_preference_dataset(tmp_path / "pairs.parquet")
    (tmp_path / "pairs.xlsx").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"expected one of \.parquet, \.jsonl"):
        load_preference_dataset(tmp_path / "pairs.xlsx")


def test_a_table_that_has_changed_is_read_anew(tmp_path):
    for count in (1, 3):
        assert len(load_preference_dataset(write_table(tmp_path / "pairs.jsonl", count))) == count


@pytest.mark.parametrize("streaming", [False, True])
def test_characters_of_patterns_in_a_path_are_plain(tmp_path, streaming):
    write_table(tmp_path / "run 1" / "pairs.jsonl", 1)
    file = write_table(tmp_path / "run [1]" / "what?*.jsonl", 2)
    for source in (file, file.parent):
        assert len(prompts(load_preference_dataset(source, streaming=streaming))) == 2


def test_local_tables_make_no_connection(tmp_path, monkeypatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.load, "increase_load_count", refuse)
    file = write_table(tmp_path / "pairs.csv", 1)
    canonical(1).to_parquet(str(tmp_path / "more.parquet"))
    assert len(load_preference_dataset(file)) == 1
    assert len(load_preference_dataset(tmp_path / "more.parquet")) == 1


# --- folders of images


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("metadata", "key"), [("metadata.csv", "id"), ("metadata.jsonl", "id"), ("metadata.csv", "file_name")]
)
def test_folders(tmp_path, metadata, key, streaming):
    dataset = load_preference_dataset(write_folders(tmp_path / "root", 3, metadata, key), streaming=streaming)
    assert prompts(dataset) == ["prompt 0", "prompt 1", "prompt 2"]
    assert torch.equal(first_pixels(dataset), EXPECTED_PIXELS)
    report = check_preference_dataset(dataset)
    assert (report["num_checked"], report["num_swapped"]) == (3, 0)


def test_folders_by_split(tmp_path):
    write_folders(tmp_path / "train", 2)
    write_folders(tmp_path / "test", 3)
    assert len(load_preference_dataset(tmp_path)) == 2
    assert len(load_preference_dataset(tmp_path, split="test")) == 3
    with pytest.raises(DatasetError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        load_preference_dataset(tmp_path, split="dev")


def test_metadata_may_name_files_hold_line_separators_and_quotes(tmp_path):
    root = write_folders(tmp_path / "root", 2)
    texts = ["one\u2028line", 'say "hi",\nplease']
    lines = ["id,prompt", f"images/0000.png,{texts[0]}", '0001,"say ""hi"",\nplease"']
    (root / "metadata.jsonl").unlink()
    (root / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    assert prompts(load_preference_dataset(root)) == texts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "rejected/0001.webp").unlink(), r"rejected/ has nothing for \['0001'\]"),
        (lambda root: picture(0).save(root / "chosen/9.png"), r"metadata has no row for \['9'\] of chosen/"),
        (lambda root: picture(0).save(root / "chosen/0000.jpg"), "the id '0000' has two files"),
        (lambda root: (root / "metadata.jsonl").unlink(), "expected one of metadata.csv and metadata.jsonl"),
        (lambda root: (root / "metadata.csv").write_text("id,prompt"), "found .'metadata.csv', 'metadata.jsonl'"),
        (lambda root: (root / "metadata.jsonl").write_text(""), "metadata has no rows"),
        (lambda root: (root / "metadata.jsonl").write_text("{"), "metadata.jsonl, line 1 cannot be read"),
        (lambda root: (root / "metadata.jsonl").write_text('{"id": "0"}'), "row 0: no 'prompt'"),
        (lambda root: (root / "metadata.jsonl").write_text('{"prompt": "a"}'), "row 0: neither 'id' nor 'file_name'"),
        (lambda root: (root / "metadata.jsonl").write_text('{"id": "0", "prompt": "a"}\n' * 2), "more than once"),
    ],
)
def test_damaged_folders_are_named(tmp_path, damage, message):
    root = write_folders(tmp_path / "root", 3)
    damage(root)
    with pytest.raises(DatasetError, match=message):
        load_preference_dataset(root)


def test_csv_metadata_with_a_missing_cell(tmp_path):
    root = write_folders(tmp_path / "root", 1, "metadata.csv")
    (root / "metadata.csv").write_text("id,prompt\n0000\n")
    with pytest.raises(DatasetError, match="more or fewer cells"):
        load_preference_dataset(root)


def test_many_missing_partners_are_counted(tmp_path):
    root = write_folders(tmp_path / "root", 12)
    for file in (root / "chosen").iterdir():
        file.unlink()
    with pytest.raises(DatasetError, match="'0004'. and 7 more"):
        load_preference_dataset(root)


# --- columns, and nothing there


def test_columns():
    columns = {"prompt": ["a", "b"], "chosen": [picture(0), picture(2)], "rejected": [picture(1), encoded(picture(3))]}
    columns["rejected"] = [picture(1), picture(3)]
    assert torch.equal(first_pixels(load_preference_dataset(columns)), EXPECTED_PIXELS)
    assert prompts(load_preference_dataset(columns, split="train[1:]", streaming=False)) == ["b"]


def test_unequal_columns():
    with pytest.raises(DatasetError, match="equal length, found {'prompt': 2, 'chosen': 1}"):
        load_preference_dataset({"prompt": ["a", "b"], "chosen": ["x"]})
    with pytest.raises(DatasetError, match="must exist"):
        dataset_from_columns({})
    with pytest.raises(DatasetError, match="cannot be read as a table"):
        dataset_from_columns({"prompt": ["a", 3]})


@pytest.mark.parametrize(
    "path", ["/no/such/place", "./pairs", "../x/y", "pairs.jsonl", "data/pairs.parquet", "a/b/c", "~/x/"]
)
def test_missing_paths(path):
    with pytest.raises(DatasetError, match="no file or folder"):
        load_preference_dataset(path)


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DatasetError, match="holds no preference data"):
        load_preference_dataset(tmp_path)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match="'someone/pairs' is neither a local path .* nor a dataset on the hub"):
        load_preference_dataset("someone/pairs")


@pytest.mark.parametrize("split", ["train[", "train[x:3]", "train[:200%]", "", "+"])
def test_slices_that_are_none(tmp_path, split):
    canonical(2).to_parquet(str(tmp_path / "pairs.parquet"))
    with pytest.raises(DatasetError, match="split="):
        load_preference_dataset(tmp_path, split=split)


def test_a_stream_cannot_be_sliced(tmp_path):
    canonical(2).to_parquet(str(tmp_path / "pairs.parquet"))
    with pytest.raises(DatasetError, match="cannot be cut from a stream"):
        load_preference_dataset(tmp_path, split="train[:1]", streaming=True)


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.parquet", "train.json"])
def test_a_table_without_rows_is_said_to_be_empty(name, tmp_path):
    columns = ("prompt", "chosen", "rejected")
    texts = {".jsonl": "", ".csv": ",".join(columns) + "\n", ".json": "[]"}
    if name.endswith(".parquet"):
        datasets.Dataset.from_dict(dict.fromkeys(columns, [])).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text(texts[Path(name).suffix])
    with pytest.raises(DatasetError, match="is empty"):
        load_preference_dataset(tmp_path)
