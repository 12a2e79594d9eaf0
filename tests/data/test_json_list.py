# SPDX-License-Identifier: Apache-2.0
"""A table that is one JSON list: the records of `json.load`, however they lie in what is read at a time."""

import json
import tracemalloc

import pytest

from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.readers import json_list
from trl_sipo.data.readers.json_list import is_json_list, json_records, read_json_lists
from trl_sipo.errors import DatasetError

RECORDS = [
    {"prompt": 'a "cat" [1, 2], {x}', "path1": "a\\b.png", "path2": "ü🦔.png", "confidence": None},
    {"prompt": "", "path1": "a", "path2": "b", "confidence": 1, "votes": [1, 2]},
    {"prompt": "a dog", "path1": "c", "path2": "d", "confidence": 0.75, "votes": [0.5]},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("characters", [7, 100, 1 << 20])
def test_the_records_are_those_of_the_whole_list(characters, indent, tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_CHARACTERS", characters)
    file = tmp_path / "a.json"
    file.write_text("\ufeff \n" + json.dumps(RECORDS, indent=indent, ensure_ascii=indent is None) + "\n", "utf-8")
    assert is_json_list(file) and list(json_records(file)) == RECORDS


def test_types_hold_what_comes_late(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_RECORDS_AT_A_TIME", 1)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    rows = read_json_lists([tmp_path / "a.json"])
    assert rows["confidence"][:] == [None, 1.0, 0.75] and rows["votes"][:] == [None, [1.0, 2.0], [0.5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(RECORDS)[:-1], "a.json, record 3: the list is broken or cut off"),
        (json.dumps(RECORDS)[:-30], "a.json, record 2: the list is broken or cut off"),
        ('[{"prompt": "a"}, {"prompt" "b"}, {}]', "a.json, record 1: the list is broken"),
        ('[{"prompt": "a"}, 7]', "a.json, record 1: expected a record {...}, found int 7"),
        ("[]", "a.json is empty: it holds no records"),
        (json.dumps(RECORDS) + "\n" + json.dumps(RECORDS), "a.json: something follows the list of 3 records"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_what_is_wrong_with_a_list_is_said(text, message, streaming, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        list(load_preference_dataset(tmp_path, streaming=streaming))


def test_what_the_first_record_lacks_is_read_from_a_stream_too(tmp_path, monkeypatch):
    rows = [{"prompt": "p", "chosen": None, "rejected": "b.png"}]
    rows += [{"prompt": "p", "chosen": "a.png", "rejected": "b.png", "label": 0.0}] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows))
    streamed, whole = (list(load_preference_dataset(tmp_path, streaming=streaming)) for streaming in (True, False))
    assert streamed == whole and [row["label"] for row in whole] == [None, 0.0, 0.0]
    assert [row["chosen"] for row in whole] == [None, str(tmp_path / "a.png"), str(tmp_path / "a.png")]
    monkeypatch.setattr(json_list, "_RECORDS_AT_A_TIME", 1)
    with pytest.raises(DatasetError, match=r"a.json, record 1: it has \['label'\], which none of the first 1 has"):
        list(load_preference_dataset(tmp_path, streaming=True))


def test_a_record_a_line_is_no_list(tmp_path):
    rows = [{"prompt": "p", "path1": "a", "path2": "b"}] * 3
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not is_json_list(tmp_path / "a.json") and len(load_preference_dataset(tmp_path)) == 3


def test_memory_does_not_grow_with_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_CHARACTERS", 1 << 16)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(RECORDS * 10_000))
    assert file.stat().st_size > 2_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_records(file)) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 700_000
    finally:
        tracemalloc.stop()
