# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value

from tests.data.pictures import canonical, encoded, pick_a_pic, picture
from trl_sipo.data.formats import FORMATS, detect_format, drop_ties, read_prompt, select_pairs, undecoded
from trl_sipo.errors import DatasetError


@pytest.mark.parametrize(
    ("columns", "name", "label", "has_label"),
    [
        (["prompt", "chosen", "rejected"], "canonical", None, None),
        (["rejected", "label", "prompt", "category", "chosen"], "canonical", "label", None),
        (["jpg_0", "jpg_1", "label_0", "label_1", "caption", "has_label"], "pick_a_pic", "label_0", "has_label"),
        (["jpg_0", "jpg_1", "label_0", "caption"], "pick_a_pic", "label_0", None),
        (["prompt", "chosen_latents", "rejected_latents"], "latents", None, None),
    ],
)
def test_formats_are_detected(columns, name, label, has_label):
    fmt = detect_format(columns)
    assert (fmt.name, fmt.label, fmt.has_label, fmt.holds_latents) == (name, label, has_label, name == "latents")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ["prompt", "chosen"],
            r"Columns found: \['prompt', 'chosen'\].*Nearest is 'canonical'.*\['rejected'\] is miss",
        ),
        (["chosen", "rejected"], r"\['prompt'\] is missing"),
        (["jpg_0", "jpg_1", "caption"], r"'pick_a_pic'.*\['label_0'\] is missing"),
        (["prompt", "chosen_latents"], r"'latents'.*\['rejected_latents'\] is missing"),
        (["image", "text"], "known: canonical: prompt, chosen, rejected; pick_a_pic: caption, jpg_0.*rename_columns"),
        ([], r"Columns found: \[\]"),
    ],
)
def test_missing_columns_are_named(columns, message):
    with pytest.raises(DatasetError, match=message):
        detect_format(columns)


def test_two_formats_at_once_are_refused():
    with pytest.raises(DatasetError, match="'canonical' and 'latents'; remove the columns of one"):
        detect_format(["prompt", "chosen", "rejected", "chosen_latents", "rejected_latents"])


def test_pick_a_pic_rows():
    fmt = FORMATS["pick_a_pic"]
    rows = list(pick_a_pic())
    assert [fmt.is_tie(row) for row in rows] == [False, False, True, False, False, False]
    assert [fmt.is_unlabelled(row) for row in rows] == [False, False, False, True, False, False]
    assert [fmt.is_swapped(row) for row in rows] == [False, True, False, False, False, True]
    kept = fmt.read(rows[0])
    assert (kept["prompt"], kept["chosen"], kept["rejected"]) == ("caption 0", rows[0]["jpg_0"], rows[0]["jpg_1"])
    swapped = fmt.read(rows[1])
    assert (swapped["chosen"], swapped["rejected"]) == (rows[1]["jpg_1"], rows[1]["jpg_0"])
    for row in (rows[2], rows[3]):
        with pytest.raises(DatasetError, match="row 7 has no preferred image"):
            fmt.read(row, where="row 7")


def test_rows_and_columns_agree_about_every_label():
    labels = [1.0, 0.0, 0.5, None, 0.7, 0.2, float("nan")]
    dataset = Dataset.from_dict(
        {"prompt": ["p"] * 7, "chosen": ["a"] * 7, "rejected": ["b"] * 7, "label": labels},
        features=Features(
            {**{name: Value("string") for name in ("prompt", "chosen", "rejected")}, "label": Value("float32")}
        ),
    )
    fmt = detect_format(dataset.column_names)
    selection = select_pairs(dataset, fmt)
    assert selection.kept.tolist() == [0, 1, 4, 5]
    assert (selection.num_ties, selection.num_unlabelled, selection.num_swapped) == (1, 2, 2)
    assert selection.num_dropped == 3
    rows = list(dataset)
    assert [index for index, row in enumerate(rows) if fmt.is_tie(row)] == [2]
    assert [index for index, row in enumerate(rows) if fmt.is_unlabelled(row)] == [3, 6]
    assert [fmt.read(rows[index])["chosen"] for index in selection.kept] == ["a", "b", "a", "b"]


@pytest.mark.parametrize("labels", [[1, 0, 1], [True, False, True]])
def test_labels_may_be_integers_or_booleans(labels):
    selection = select_pairs(canonical(3, label=labels), detect_format(["prompt", "chosen", "rejected", "label"]))
    assert (len(selection.kept), selection.num_swapped) == (3, 1)


def test_column_of_nulls_is_all_unlabelled():
    selection = select_pairs(canonical(3, label=[None] * 3), detect_format(["prompt", "chosen", "rejected", "label"]))
    assert (len(selection.kept), selection.num_unlabelled) == (0, 3)


def test_has_label_null_is_not_judged():
    dataset = pick_a_pic().remove_columns("has_label").add_column("has_label", [True, None, True, False, True, True])
    assert select_pairs(dataset, FORMATS["pick_a_pic"]).kept.tolist() == [0, 4, 5]


def test_has_label_nan_is_not_judged_in_a_stream_either():
    judged = [1.0, float("nan"), None, 0.0, True, 1]
    dataset = pick_a_pic().remove_columns("has_label").add_column("has_label", judged)
    is_unlabelled = [FORMATS["pick_a_pic"].is_unlabelled({"label_0": 1.0, "has_label": value}) for value in judged]
    assert is_unlabelled == [False, True, True, True, False, False]
    assert select_pairs(dataset, FORMATS["pick_a_pic"]).num_unlabelled == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0, -1.0], r"row 1, column 'label': .*number in \[0, 1\].*found -1.0"),
        ([0, 3], "row 1, column 'label': .*found 3"),
        (["1", "0"], "row 0, column 'label': .*found '1'.*Rename"),
    ],
)
def test_labels_of_another_meaning_are_refused(labels, message):
    dataset = canonical(2, label=labels)
    fmt = detect_format(dataset.column_names)
    with pytest.raises(DatasetError, match=message):
        select_pairs(dataset, fmt)
    with pytest.raises(DatasetError, match=message):
        for index, row in enumerate(undecoded(dataset, fmt)):
            fmt.read(row, where=f"row {index}")


def test_dropping_ties_neither_decodes_nor_copies_images():
    count = 2000
    broken = [b"no image"] * count
    dataset = Dataset.from_dict(
        {
            "caption": ["c"] * count,
            "jpg_0": [{"bytes": content, "path": None} for content in broken],
            "jpg_1": broken,
            "label_0": np.tile([1.0, 0.5, 0.0, 0.5], count // 4),
        }
    ).cast_column("jpg_0", Image())
    kept, num_dropped = drop_ties(dataset, detect_format(dataset.column_names))
    assert (len(kept), num_dropped) == (count // 2, count // 2)
    assert kept.select_columns("label_0")[:4]["label_0"] == [1.0, 0.0, 1.0, 0.0]
    addresses = [
        [buffer.address for chunk in table.data.column("jpg_1").chunks for buffer in chunk.buffers() if buffer]
        for table in (dataset, kept)
    ]
    assert addresses[0] == addresses[1]


def test_dropping_ties_composes_with_a_selection():
    dataset = pick_a_pic().select([5, 3, 2, 1])
    kept, num_dropped = drop_ties(dataset, FORMATS["pick_a_pic"])
    assert kept["caption"][:] == ["caption 5", "caption 1"]
    assert num_dropped == 2


def test_nothing_to_drop_gives_the_dataset_itself():
    dataset = canonical(3)
    kept, num_dropped = drop_ties(dataset, detect_format(dataset.column_names))
    assert kept is dataset
    assert num_dropped == 0


def test_images_are_left_as_stored_and_other_columns_left_out():
    dataset = canonical(2, category=["x", "y"]).with_format("torch")
    rows = undecoded(dataset, detect_format(dataset.column_names))
    assert list(rows[0]) == ["prompt", "chosen", "rejected"]
    assert rows[0]["chosen"]["bytes"] == encoded(picture(0))
    assert dataset.features["chosen"].decode  # the caller's own dataset has not changed


def test_a_transform_is_refused():
    dataset = canonical(2).with_transform(lambda batch: batch)
    with pytest.raises(DatasetError, match=r"set_transform.*dataset.map\(\.\.\.\) instead"):
        undecoded(dataset, FORMATS["canonical"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", "a cat"),
        ([{"role": "user", "content": "a cat"}], "a cat"),
        ([{"role": "system", "content": "Draw."}, {"role": "user", "content": "a cat"}], "a cat"),
        ([{"role": "user", "content": "a cat"}, {"role": "user", "content": "black"}], "a cat\nblack"),
        ([{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]}], "a cat"),
    ],
)
def test_prompts(value, expected):
    assert read_prompt(value) == expected


def test_conversations_survive_a_table():
    prompt = [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
    turn = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    stored = Dataset.from_dict({"prompt": [prompt]}, features=Features({"prompt": List(turn)}))
    assert read_prompt(stored[0]["prompt"]) == "a cat"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "prompt is empty"),
        (" \n", "prompt is empty"),
        (None, "expected a string or a conversation, found NoneType"),
        (3, "found int 3"),
        ([], "found list"),
        (["a cat"], "found list"),
        ([{"role": "assistant", "content": "a cat"}], "prompt is empty"),
        ([{"role": "user", "content": None}], "content of a turn is NoneType"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}], "prompts are text only"),
    ],
)
def test_what_is_no_prompt_is_named(value, message):
    with pytest.raises(DatasetError, match=f"^row 4: .*{message}"):
        read_prompt(value, where="row 4")
