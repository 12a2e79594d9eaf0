# SPDX-License-Identifier: Apache-2.0
"""Prompt sets from everywhere: composed, the demo's, files of each kind, and datasets."""

import json
import logging
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from trl_sipo.demo.fashion import CLASSES, split_prompts
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.generation.composing import compose, split_objects
from trl_sipo.generation.names import check_folder_names
from trl_sipo.generation.prompt_sets import PromptRecord, compose_prompts, load_prompts, prompt_id_of
from trl_sipo.rewards.requirements import parse

PROMPTS = ["a red bag", "Zwei Füße, 2 m", "日本語", 'a bag, "big"', "a photo of a cat/dog"]


def texts(records):
    return [record.prompt for record in records]


def test_composed_sets():
    records = load_prompts("composed")
    assert len(records) == 553 and records == compose_prompts(compose())
    check_folder_names([record.prompt_id for record in records], "prompt")
    assert all(parse(record.prompt).category == record.category for record in records)
    assert {record.source for record in records} == {"composed"}
    assert len(load_prompts("composed:60")) == 60
    assert load_prompts("composed:60", seed=1) != load_prompts("composed:60")


@pytest.mark.parametrize("seed", [0, 5])
def test_composed_sets_to_train_and_to_test_share_no_object(seed):
    train, test = (load_prompts(f"composed:{part}:150", seed=seed) for part in ("train", "test"))
    assert len(train) == len(test) == 150
    for records, objects in zip((train, test), split_objects(), strict=True):
        assert {required.name for r in records for required in parse(r.prompt).objects} <= set(objects)
    assert len(load_prompts("composed:train")) == 553 - 40  # of 40 objects there are 40 single ones


@pytest.mark.parametrize(("spec", "number"), [("fashion", 64), ("fashion:train", 48), ("fashion:held-out", 16)])
def test_the_demo_has_sets(spec, number):
    records = load_prompts(spec)
    assert len(records) == number and {record.category for record in records} == set(CLASSES)
    if spec == "fashion:held-out":
        assert texts(records) == [prompt.text for prompt in split_prompts()[1]]
    moving = load_prompts(f"moving-{spec}")
    assert len(moving) == number and all(" moving " in record.prompt for record in moving)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("composed:many", "'composed:many' is no prompt set"),
        ("composed:10:train", "is no prompt set"),
        ("composed:-3", "is no prompt set"),
        ("composed:0", "0 prompts were asked for"),
        ("composed:99999999", "99999999 prompts were asked for"),
        ("fashion:test", "no part 'test'; they have train, held-out"),
        ("dataset:", "names no dataset"),
    ],
)
def test_specifications_that_name_nothing(spec, message):
    with pytest.raises(ConfigurationError, match=message):
        load_prompts(spec)


def write(path, rows):
    """Rows of columns in the format of the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8-sig")
    else:
        table = datasets.Dataset.from_list(rows)
        (table.to_csv if path.suffix == ".csv" else table.to_parquet)(str(path))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_files_of_columns(tmp_path, suffix):
    rows = [{"prompt_id": f"{n:03d}_x", "prompt": text, "category": "old", "n": n} for n, text in enumerate(PROMPTS)]
    path = write(tmp_path / f"prompts{suffix}", rows)
    assert load_prompts(str(path)) == [PromptRecord(row["prompt_id"], row["prompt"], "old", str(path)) for row in rows]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".txt"])
def test_names_are_made_of_texts_where_there_are_none(tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(["", *PROMPTS, " "]), encoding="utf-8-sig")
    else:
        write(path, [{"prompt": text} for text in PROMPTS])
    records = load_prompts(str(path))
    assert texts(records) == PROMPTS
    assert [record.prompt_id for record in records] == [prompt_id_of(text) for text in PROMPTS]
    assert all(re.fullmatch(r"[a-z0-9-]{10,60}", record.prompt_id) for record in records)


def test_names_are_as_they_have_been():
    """Seeds of noise depend on them: another name is another noise."""
    assert prompt_id_of("a photo of a bench") == "a-photo-of-a-bench-7f90b3761d"
    assert prompt_id_of("日本語") == "77710aedc7"
    assert len(prompt_id_of("word " * 1000)) <= 60


def test_lists_of_texts_and_genevals_own_file(tmp_path):
    plain = tmp_path / "list.json"
    plain.write_text(json.dumps(PROMPTS))
    assert texts(load_prompts(str(plain))) == PROMPTS
    geneval = tmp_path / "evaluation_metadata.jsonl"
    row = {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "a photo of two benchs"}
    write(geneval, [row])
    (record,) = load_prompts(str(geneval))
    assert record.category == "counting" == parse(record.prompt).category


def test_empty_and_repeated_prompts_are_left_out_and_counted(tmp_path, caplog):
    path = write(tmp_path / "p.jsonl", [{"prompt": p} for p in ["a", "b", "", "a ", None, "  ", "c", "a"]])
    with caplog.at_level(logging.WARNING):
        assert texts(load_prompts(str(path))) == ["a", "b", "c"]
    assert "3 prompts are empty and left out; 3 are left" in caplog.text
    assert "2 prompts are repeated and left out; 3 are left" in caplog.text


def test_a_limit_chooses_at_random_and_keeps_the_order(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"prompt {number:03d}" for number in range(100)))
    some = load_prompts(str(path), limit=10, seed=2)
    assert len(some) == 10 and texts(some) == sorted(texts(some)) != texts(load_prompts(str(path)))[:10]
    assert some == load_prompts(str(path), limit=10, seed=2) != load_prompts(str(path), limit=10, seed=3)
    assert len(load_prompts(str(path), limit=1000)) == 100
    with pytest.raises(ConfigurationError, match="limit=0"):
        load_prompts(str(path), limit=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.json", '["a", 3]', "entry 1: expected a text or an object"),
        ("a.json", '["a"', "a.json cannot be read"),
        ("a.json", "", "holds no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "a.jsonl, line 2 cannot be read"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "stands twice"),
        ("a.jsonl", '{"prompt": 3}', "prompt 0: expected a string"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "half of a character"),
        ("a.jsonl", '{"words": "a"}', "no column of prompt, caption, text"),
        ("a.csv", "prompt,category\na cat\n", "line 2: not as many cells"),
        ("a.csv", "prompt\na cat, a dog\n", "line 2: not as many cells"),
        ("a.csv", "prompt,prompt\na cat,a dog\n", "the column 'prompt' stands twice"),
        ("a.csv", "words\na cat\n", "no column of prompt, caption, text, Prompt; the columns are \\['words'\\]"),
        ("a.parquet", "prompt", "a.parquet cannot be read"),
        ("a.jsonl", '{"prompt": "a", "prompt_id": "../a"}', "prompt name '../a' cannot be that of a folder"),
        ("a.jsonl", '{"prompt": "a", "prompt_id": 1}\n{"prompt": "b", "prompt_id": "1"}', "the same folder's"),
        ("a.md", "a", "expected a file of .txt, .json, .jsonl, .csv, .parquet"),
    ],
)
def test_files_that_are_no_prompt_sets(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DatasetError, match=message):
        load_prompts(str(path))


def test_what_is_not_there_or_no_text(tmp_path):
    with pytest.raises(DatasetError, match="no prompt set '.*nothing.txt': no file of that name"):
        load_prompts(str(tmp_path / "nothing.txt"))
    with pytest.raises(DatasetError, match="is a folder; write dataset:"):
        load_prompts(str(tmp_path))
    (tmp_path / "latin.txt").write_bytes("Füße".encode("latin-1"))
    with pytest.raises(DatasetError, match="latin.txt is no UTF-8"):
        load_prompts(str(tmp_path / "latin.txt"))


@pytest.fixture
def pick_a_pic(tmp_path):
    """A few rows of the layout of Pick-a-Pic, with captions that come several times, as a folder of Parquet files."""
    image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    captions = ["a cat", "a dog", "a cat", "a bird", "a dog"]
    rows = {"caption": captions, "jpg_0": [image] * 5, "jpg_1": [image] * 5, "label_0": [1.0] * 5}
    table = datasets.Dataset.from_dict(rows)
    (tmp_path / "data").mkdir()
    table.select([3]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    table.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    return tmp_path


def test_unique_captions_of_a_preference_dataset(pick_a_pic, caplog):
    with caplog.at_level(logging.WARNING):
        records = load_prompts(f"dataset:{pick_a_pic}:caption:test")
    assert texts(records) == ["a cat", "a dog", "a bird"]
    assert "2 prompts are repeated" in caplog.text
    assert texts(load_prompts(f"dataset:{pick_a_pic}")) == ["a bird"]  # its caption, of the training split
    assert texts(load_prompts(f"dataset:{pick_a_pic}:caption:test[:2]")) == ["a cat", "a dog"]


def test_of_a_dataset_on_the_hub_no_image_is_decoded(pick_a_pic, monkeypatch):
    """Without a network: the hub's answer is a stream of a local file. The images of this one are broken."""
    path = str(next((pick_a_pic / "data").glob("test*")))
    table = datasets.Dataset.from_parquet(path).cast_column("jpg_0", datasets.Image(decode=False))
    broken = table.map(lambda row: {"jpg_0": {"bytes": b"no image", "path": None}})
    broken.cast_column("jpg_0", datasets.Image()).to_parquet(path)
    asked = []

    def answer(*arguments, **options):
        asked.append((arguments, options))
        return datasets.IterableDataset.from_parquet(path)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert texts(load_prompts("dataset:org/pick-a-pic:caption:test")) == ["a cat", "a dog", "a bird"]
    assert asked == [(("org/pick-a-pic", None), {"split": "test", "streaming": True})]


def test_columns_of_a_saved_dataset(tmp_path):
    rows = {"words": ["a", "b"], "category": ["x", "y"], "prompt_id": ["one", "two"], "prompt": ["c", "d"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    records = load_prompts(f"dataset:{tmp_path / 'saved'}:words")
    assert [(r.prompt_id, r.prompt, r.category) for r in records] == [("one", "a", "x"), ("two", "b", "y")]
    assert texts(load_prompts(f"dataset:{tmp_path / 'saved'}")) == ["c", "d"]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (":image", "has no column 'image'; it has \\['caption'"),
        (":caption:validation", "has no split 'validation'"),
    ],
)
def test_datasets_without_what_is_asked_for(pick_a_pic, rest, message):
    with pytest.raises(DatasetError, match=message):
        load_prompts(f"dataset:{pick_a_pic}{rest}")
    with pytest.raises(DatasetError, match="there is no file or folder"):
        load_prompts(f"dataset:{pick_a_pic / 'nothing'}{rest}")
