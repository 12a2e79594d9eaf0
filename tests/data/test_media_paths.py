# SPDX-License-Identifier: Apache-2.0
"""Media are read from the folder of their table, and from where the user says; links are followed and said."""

import json
import logging

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset

from tests.data.pictures import picture
from trl_sipo import load_preference_dataset
from trl_sipo.data.media_paths import _warn_of_link, warn_of_links
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.errors import DatasetError

LEADS_OUT = "row 0, column 'chosen': the path .* leads out of"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with two pictures, beside `data`, which is empty."""
    for name in ("data", "elsewhere"):
        (tmp_path / name).mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        picture(number).save(tmp_path / "elsewhere" / name)
    return tmp_path / "elsewhere"


def table(folder, chosen, rejected):
    file = folder / "train.jsonl"
    file.write_text(json.dumps({"prompt": "a cat", "chosen": str(chosen), "rejected": str(rejected)}) + "\n")
    return file


def opens(rows):
    return PreferenceDataset(rows, transform=PairedTransform(8))[0]["chosen_pixels"].shape == (3, 8, 8)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("media_folder", ["{root}/elsewhere", "{root}", "/"])
def test_absolute_paths_are_taken_where_the_user_says(media_folder, streaming, elsewhere, tmp_path):
    file = table(tmp_path / "data", elsewhere / "a.png", elsewhere / "b.png")
    table_named = "" if streaming else "train.jsonl: "
    with pytest.raises(DatasetError, match=f"{table_named}{LEADS_OUT} .*/data'.*--dataset_media_folder"):
        list(load_preference_dataset(file, streaming=streaming))
    media_folder = media_folder.format(root=tmp_path)
    rows = load_preference_dataset(file, streaming=streaming, media_folder=media_folder)
    assert next(iter(rows))["chosen"] == str(elsewhere / "a.png")


def test_relative_paths_begin_in_the_media_folder_and_stay_there(elsewhere, tmp_path):
    assert opens(load_preference_dataset(table(tmp_path / "data", "a.png", "b.png"), media_folder=elsewhere))
    (tmp_path / "elsewhere2").mkdir()  # its name begins with the folder's, which does not make it a part
    for path in ("../data/a.png", "../elsewhere2/a.png", str(tmp_path / "elsewhere2" / "a.png")):
        with pytest.raises(DatasetError, match=LEADS_OUT):
            load_preference_dataset(table(tmp_path / "data", path, "b.png"), media_folder=elsewhere)


def test_a_saved_dataset(elsewhere, tmp_path, monkeypatch):
    """Its relative paths begin in its folder, or in the working directory."""
    monkeypatch.chdir(elsewhere)
    for chosen, is_taken in {"a.png": True, str(elsewhere / "a.png"): True, "../data/a.png": False}.items():
        Dataset.from_dict({"prompt": ["a"], "chosen": [chosen], "rejected": ["b.png"]}).save_to_disk(
            tmp_path / "saved"
        )
        if is_taken:
            assert opens(load_preference_dataset(tmp_path / "saved"))
        else:
            with pytest.raises(DatasetError, match=LEADS_OUT):
                load_preference_dataset(tmp_path / "saved")


def test_a_dataset_of_the_hub(elsewhere, tmp_path, monkeypatch):
    """Its paths lead into the working directory, or to what was downloaded."""
    monkeypatch.chdir(tmp_path / "data")
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": [str(elsewhere / "a.png")], "rejected": ["b.png"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: rows)
    with pytest.raises(DatasetError, match=LEADS_OUT):
        load_preference_dataset("some/pairs")
    assert len(load_preference_dataset("some/pairs", media_folder=elsewhere)) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(elsewhere))
    assert len(load_preference_dataset("some/pairs")) == 1


def test_what_is_made_in_python_is_the_users_own(elsewhere):
    arms = {"chosen": [str(elsewhere / "a.png")], "rejected": [str(elsewhere / "b.png")]}
    assert opens(load_preference_dataset({"prompt": ["a cat"], **arms}))


@pytest.mark.parametrize("streaming", [False, True])
def test_links_are_said_once_for_each_folder(streaming, elsewhere, tmp_path, caplog):
    _warn_of_link.cache_clear()
    (tmp_path / "data" / "images").symlink_to(elsewhere)
    file = table(tmp_path / "data", "images/a.png", "images/b.png")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert len(list(load_preference_dataset(file, streaming=streaming))) == 1
    told = [record.getMessage() for record in caplog.records if "Links in" in record.getMessage()]
    assert len(told) == 1 and str(tmp_path / "data" / "images") in told[0] and str(elsewhere) in told[0]


def test_links_within_the_folder_are_nothing_to_say(elsewhere, tmp_path, caplog):
    _warn_of_link.cache_clear()
    (elsewhere / "c.png").symlink_to(elsewhere / "a.png")
    (tmp_path / "link").symlink_to(elsewhere)
    with caplog.at_level(logging.WARNING):
        assert opens(load_preference_dataset(table(elsewhere, "c.png", tmp_path / "link" / "b.png")))
        warn_of_links([str(elsewhere / "c.png"), str(elsewhere / "nowhere.png")], [str(elsewhere)])
    assert "Links in" not in caplog.text
