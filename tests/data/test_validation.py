# SPDX-License-Identifier: Apache-2.0
import logging
import time
from typing import Any

import pytest
from datasets import Dataset, Image, IterableDataset

from tests.data.pictures import encoded, pick_a_pic, picture
from trl_sipo.data.validation import check_preference_dataset
from trl_sipo.errors import DatasetError


def replaced(dataset: Dataset, column: str, values: dict[int, Any]) -> Dataset:
    """The dataset with other values in some rows of a column."""
    columns = dataset[:]
    for row, value in values.items():
        columns[column][row] = value
    return Dataset.from_dict(columns)


def raw(count: int) -> Dataset:
    """Pairs whose images are stored as bytes."""
    return Dataset.from_dict(
        {
            "prompt": [f"prompt {row}" for row in range(count)],
            "chosen": [encoded(picture(2 * row)) for row in range(count)],
            "rejected": [encoded(picture(2 * row + 1)) for row in range(count)],
        }
    )


def test_report():
    assert check_preference_dataset(pick_a_pic()) == {
        "format": "pick_a_pic",
        "streaming": False,
        "num_rows": 6,
        "num_ties": 1,
        "num_unlabelled": 1,
        "num_swapped": 2,
        "num_pairs": 4,
        "num_checked": 4,
        "num_identical_arms": 0,
        "num_unequal_sizes": 0,
        "smallest_side": 30,
    }


def test_sizes_and_identical_arms_are_counted_and_warned_about(caplog):
    dataset = replaced(
        raw(4), "rejected", {0: encoded(picture(0), "PNG", compress_level=0), 2: encoded(picture(9, 50, 12))}
    )
    with caplog.at_level(logging.WARNING, logger="trl_sipo"):
        report = check_preference_dataset(dataset)
    assert (report["num_identical_arms"], report["num_unequal_sizes"], report["smallest_side"]) == (1, 1, 12)
    assert "1 of 4 checked pairs have the same picture or video" in caplog.text


def test_nothing_is_warned_about_without_reason(caplog):
    check_preference_dataset(raw(2))
    assert not caplog.records


def test_empty():
    with pytest.raises(DatasetError, match="the dataset is empty"):
        check_preference_dataset(raw(2).select([]))


def test_empty_after_dropping_ties_says_how_many_and_why():
    dataset = pick_a_pic().select([2, 3, 2])
    with pytest.raises(DatasetError, match="of 3 rows 2 are ties .* and 1 have no label"):
        check_preference_dataset(dataset)


def test_broken_images_are_named_by_row_and_arm():
    dataset = replaced(pick_a_pic(), "jpg_0", {1: encoded(picture(1), "JPEG")[:-200], 4: b"?"})
    with pytest.raises(DatasetError) as caught:
        check_preference_dataset(dataset)
    message = str(caught.value)
    assert "2 problem(s)" in message
    assert "row 1, the rejected image: the image does not open" in message  # label_0 is 0: the arms are swapped
    assert "row 4, the chosen image: not an image" in message


def test_broken_images_of_rows_that_are_not_pairs_do_not_matter():
    dataset = replaced(pick_a_pic(), "jpg_0", {2: b"?", 3: b"?"})
    assert check_preference_dataset(dataset)["num_pairs"] == 4


def test_only_the_first_problems_are_listed():
    with pytest.raises(DatasetError, match=r"(?s)^12 problem\(s\).*row 4, .*and 7 more") as caught:
        check_preference_dataset(replaced(raw(12), "chosen", dict.fromkeys(range(12), b"?")))
    assert "row 5," not in str(caught.value)


@pytest.mark.parametrize(("num_checked", "rows"), [(3, [0, 10, 20]), (2, [0, 20]), (1, [0]), (21, list(range(21)))])
def test_the_sample_is_evenly_spaced(num_checked, rows):
    dataset = replaced(raw(21), "chosen", dict.fromkeys(range(21), b"?"))
    with pytest.raises(DatasetError) as caught:
        check_preference_dataset(dataset, num_checked_images=num_checked)
    message = str(caught.value)
    assert message.startswith(f"{len(rows)} problem(s)")
    assert [row for row in range(21) if f"row {row}," in message] == rows[:5]


def test_every_image_of_a_small_set_is_decoded():
    dataset = replaced(raw(300), "chosen", {157: encoded(picture(0))[:60]})
    with pytest.raises(DatasetError, match="row 157, the chosen image: the image does not open"):
        check_preference_dataset(dataset)


def _as_images(dataset: Dataset) -> Dataset:
    return dataset.cast_column("chosen", Image()).cast_column("rejected", Image())


@pytest.mark.parametrize("prepare", [lambda dataset: dataset, _as_images], ids=["bytes", "images"])
@pytest.mark.parametrize(("value", "message"), [(b"", r"is empty \(0 bytes\)"), (None, r"is missing \(null\)")])
def test_images_of_all_pairs_are_there(prepare, value, message):
    dataset = prepare(replaced(raw(12), "rejected", {7: value}))
    with pytest.raises(DatasetError, match=f"row 7, column 'rejected': the image {message}"):
        check_preference_dataset(dataset, num_checked_images=1)
    with pytest.raises(DatasetError, match="row 2, column 'rejected'"):  # its place among the rows that were selected
        check_preference_dataset(dataset.select([3, 9, 7, 1]), num_checked_images=1)
    assert check_preference_dataset(dataset.select([9, 3, 11]), num_checked_images=1)["num_pairs"] == 3


def test_images_of_rows_that_are_no_pairs_need_not_be_there():
    assert check_preference_dataset(replaced(pick_a_pic(), "jpg_0", {2: b"", 3: None}), num_checked_images=1)


def test_files_of_all_pairs_are_not_empty(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "empty.png").touch()
    paths = [str(tmp_path / "0.png")] * 9
    dataset = Dataset.from_dict({"prompt": ["p"] * 9, "chosen": paths, "rejected": paths})
    dataset = replaced(dataset, "chosen", {5: str(tmp_path / "empty.png")})
    for rows in (dataset, _as_images(dataset)):
        with pytest.raises(DatasetError, match=r"row 5, column 'chosen': the file '.*empty.png' is empty"):
            check_preference_dataset(rows, num_checked_images=1)


@pytest.mark.parametrize(("count", "is_shown"), [(4, False), (6, True)])
def test_a_long_check_shows_its_progress(count, is_shown, monkeypatch, capsys):
    monkeypatch.setattr("trl_sipo.data.validation._NUM_SILENT", {"image": 5})
    check_preference_dataset(raw(count))
    assert ("Checking images" in capsys.readouterr().err) is is_shown


@pytest.mark.parametrize("as_stream", [False, True])
def test_swapped_pairs_of_named_columns_are_warned_about(as_stream, caplog):
    """A label of one's own (a class, a score) would turn the preference round without a word."""
    dataset = raw(4).add_column("label", [0, 1, 0, 1])
    check_preference_dataset(dataset.to_iterable_dataset() if as_stream else dataset)
    (record,) = caplog.records
    assert "In 2 of 4 pairs" in record.getMessage() and "dataset.remove_columns('label')" in record.getMessage()
    caplog.clear()
    check_preference_dataset(raw(4).add_column("label", [1, 1, 1, 1]))
    check_preference_dataset(pick_a_pic())  # where the label says which is which
    assert not caplog.records


def test_num_checked_images():
    assert check_preference_dataset(raw(5), num_checked_images=0)["num_checked"] == 0
    with pytest.raises(DatasetError, match="must not be negative"):
        check_preference_dataset(raw(5), num_checked_images=-1)


def test_paths_of_all_rows_must_exist(tmp_path):
    picture(0).save(tmp_path / "0.png")
    paths = [str(tmp_path / "0.png")] * 50
    paths[31] = str(tmp_path / "gone.png")
    dataset = Dataset.from_dict({"prompt": ["p"] * 50, "chosen": [str(tmp_path / "0.png")] * 50, "rejected": paths})
    with pytest.raises(DatasetError, match="row 31, column 'rejected': there is no file .*gone.png"):
        check_preference_dataset(dataset, num_checked_images=1)
    with pytest.raises(DatasetError, match="row 31, column 'rejected': there is no file .*gone.png"):
        check_preference_dataset(dataset.cast_column("rejected", Image()), num_checked_images=1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("  ", "row 3, column 'prompt': the prompt is empty"),
        (None, "row 3, column 'prompt': expected a string or a conversation, found NoneType"),
    ],
)
def test_prompts_of_all_rows_are_checked(prompt, message):
    dataset = replaced(raw(6), "prompt", {3: prompt})
    with pytest.raises(DatasetError, match=f"(?s){message}.*dataset.filter"):
        check_preference_dataset(dataset, num_checked_images=1)


def test_prompts_of_ties_do_not_matter():
    assert check_preference_dataset(replaced(pick_a_pic(), "caption", {2: ""}))["num_pairs"] == 4


@pytest.mark.parametrize("num_checked", [1, 256])
def test_data_of_language_models_is_recognised(num_checked):
    answers = {
        "text": ("Sure! Here is a poem.", "No, I would rather not."),
        "conversation": ([{"role": "assistant", "content": "Sure!"}], [{"role": "assistant", "content": "No."}]),
    }
    for chosen, rejected in answers.values():
        dataset = Dataset.from_dict({"prompt": ["Write!"] * 2, "chosen": [chosen] * 2, "rejected": [rejected] * 2})
        with pytest.raises(DatasetError, match="row 0, the chosen image: .*'chosen' and 'rejected' must hold images"):
            check_preference_dataset(dataset, num_checked_images=num_checked)


def test_missing_columns_and_transforms():
    with pytest.raises(DatasetError, match=r"\['rejected'\] is missing"):
        check_preference_dataset(raw(2).remove_columns("rejected"))
    with pytest.raises(DatasetError, match="set_transform"):
        check_preference_dataset(raw(2).with_transform(lambda batch: batch))


def test_latents():
    dataset = Dataset.from_dict(
        {"prompt": ["a", "b"], "chosen_latents": [[[1.0]], [[2.0]]], "rejected_latents": [[[1.0]], [[3.0]]]}
    )
    report = check_preference_dataset(dataset)
    assert (report["format"], report["num_identical_arms"], report["smallest_side"]) == ("latents", 1, None)
    broken = dataset.remove_columns("rejected_latents").add_column("rejected_latents", [[[1.0]], [[3.0, 4.0]]])
    with pytest.raises(DatasetError, match="row 1: chosen and rejected latents differ in shape"):
        check_preference_dataset(broken)


def test_streams():
    report = check_preference_dataset(pick_a_pic().to_iterable_dataset())
    assert report["streaming"] is True
    assert (report["num_rows"], report["num_ties"], report["num_unlabelled"]) == (6, 1, 1)
    assert (report["num_pairs"], report["num_swapped"], report["num_checked"]) == (4, 2, 4)
    broken = replaced(raw(3), "chosen", {2: b"?"})
    with pytest.raises(DatasetError, match="row 2, the chosen image"):
        check_preference_dataset(broken.to_iterable_dataset())


def test_streams_are_read_only_at_their_beginning():
    def rows():
        for number in range(100):
            assert number < 20, "the check reads on and on"
            yield {"prompt": "p", "chosen": picture(1), "rejected": picture(2)}

    assert check_preference_dataset(IterableDataset.from_generator(rows))["num_rows"] == 8


def test_a_hundred_thousand_rows_take_seconds(tmp_path):
    count = 100_000
    picture(0).save(tmp_path / "0.png")
    path = str(tmp_path / "0.png")
    dataset = Dataset.from_dict(
        {"prompt": [f"p{row}" for row in range(count)], "chosen": [path] * count, "rejected": [path] * count}
    )
    start = time.perf_counter()
    assert check_preference_dataset(dataset, num_checked_images=4)["num_pairs"] == count
    assert time.perf_counter() - start < 20
    columns = dataset[:]
    columns["chosen"][54_321] = str(tmp_path / "gone.png")
    with pytest.raises(DatasetError, match="row 54321, column 'chosen': there is no file"):
        check_preference_dataset(Dataset.from_dict(columns), num_checked_images=4)
