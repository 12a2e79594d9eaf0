# SPDX-License-Identifier: Apache-2.0
"""Each hostile input gives its error, or is taken as documented: by the check, by encoding, by training; at once."""

import json
import logging
import os
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.docs.pages import SOURCE, read
from tests.hostile.caches import CACHES
from tests.hostile.media import IMAGES, VIDEOS, good_image, good_video
from tests.hostile.rows import LABELS, LATENTS, PROMPTS
from tests.hostile.tables import TABLES
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.cached import Encoded
from trl_sipo import load_preference_dataset
from trl_sipo.cli.main import main
from trl_sipo.data.cache.broken import Attempts, BrokenPair
from trl_sipo.data.checking.check import CheckOptions, check_data
from trl_sipo.data.images import open_image
from trl_sipo.data.media_paths import _warn_of_link
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.validation import check_preference_dataset
from trl_sipo.data.video import ClipSampler
from trl_sipo.errors import DatasetError

GROUPS = {
    "Images": IMAGES,
    "Videos": VIDEOS,
    "Prompts": PROMPTS,
    "Labels": LABELS,
    "Latents": LATENTS,
    "Tables": TABLES,
    "Caches": CACHES,
}
SECONDS = 30  # for any one input; most take hundredths
QUIET = CheckOptions(show_progress=False, num_shown=2)
TRANSFORM = PairedTransform(16)
CLIP = ClipSampler(5)


@pytest.fixture(autouse=True)
def _in_time():
    """A hang is a failure."""

    def stop(*_):
        raise TimeoutError(f"no answer within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Tables are cached in a folder of the test, and not in the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _warn_of_link.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """An empty folder, in another one that nothing may be written to."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@contextmanager
def expected(case, row=""):
    """The error of a case, which names the row; or none."""
    if case.refused is None:
        yield
        return
    with pytest.raises(DatasetError) as found:
        yield
    assert case.refused in str(found.value) and row in str(found.value)


def rows_of_media(folder, case, good):
    """A table of two rows, the second of which has the hostile medium."""
    name = good(folder)
    rows = [{"prompt": "a", "chosen": name, "rejected": name}, {"prompt": "b", "chosen": name, "rejected": name}]
    rows[1]["rejected"] = case.make(folder)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preference_dataset(folder / "train.jsonl")


def check_everywhere(rows, case, clip=None):
    """`trl-sipo data check`, what trainers look at before they start, a pair in training, and a pair in encoding."""
    options = CheckOptions(show_progress=False, num_shown=2, num_frames=clip and clip.num_frames)
    bad = check_data(rows, options).listed["bad_rows"]
    assert [row.row for row in bad] == ([] if case.refused is None else [1])
    assert all(case.refused in row.reason for row in bad)
    with expected(case, "row 1"):
        check_preference_dataset(rows, clip=clip)
    pairs = PreferenceDataset(rows, transform=TRANSFORM, clip=clip)
    with expected(case, "row 1"):
        assert torch.isfinite(pairs[1]["rejected_pixels"]).all()
    planned = np.array([[[16, 16, clip.num_frames if clip else 1]] * 2] * 2)
    found = Attempts(pairs, planned)[1]
    assert isinstance(found, BrokenPair) == (case.refused is not None)
    assert case.refused is None or case.refused in found.reason


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_images(case, folder, caplog):
    with caplog.at_level(logging.WARNING):
        rows = rows_of_media(folder, case, good_image)
    assert ("Links in" in caplog.text) == (case.what == "a link to a file elsewhere")
    check_everywhere(rows, case)
    if case.refused is None:
        assert case.shows(open_image(rows[1]["rejected"]))


@pytest.mark.parametrize("case", VIDEOS, ids=str)
def test_videos(case, folder):
    check_everywhere(rows_of_media(folder, case, good_video), case, CLIP)


def stream_of(*rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_prompts(case, folder):
    """As a stream, which may hold what no table can."""
    image = str(folder / good_image(folder))
    row = {"chosen": image, "rejected": image}
    rows = stream_of({"prompt": "a cat", **row}, {"prompt": case.make(folder), **row})
    bad = check_data(rows, QUIET).listed["bad_rows"]
    assert [row.row for row in bad] == ([] if case.refused is None else [1])
    assert all(case.refused in row.reason for row in bad)
    with expected(case, "row 1"):
        check_preference_dataset(rows)
    with expected(case, "row 1"):
        assert list(StreamingPreferenceDataset(rows, transform=TRANSFORM))[1]["prompt"] == case.make(folder)


@pytest.mark.parametrize("case", LABELS, ids=str)
def test_labels(case, folder):
    image = str(folder / good_image(folder))
    good = {"prompt": "a cat", "chosen": image, "rejected": image, "label": 1.0}
    rows = stream_of(good, {**good, "label": case.make(folder)})
    with expected(case, "row 1"):
        assert check_preference_dataset(rows)["num_unlabelled"] == 1
    pairs = StreamingPreferenceDataset(rows, transform=TRANSFORM)
    with expected(case, "row 1"):
        assert len(list(pairs)) == 1 and pairs.num_unlabelled == 1
    checked = check_data(rows, QUIET)
    assert len(checked.listed["bad_rows"]) == (case.refused is not None)
    if isinstance(case.make(folder), float | None):  # of others there is no column with numbers
        rows = Dataset.from_list([good, {**good, "label": case.make(folder)}])
        with expected(case, "row 1"):
            assert len(PreferenceDataset(rows, transform=TRANSFORM)) == 1


@pytest.mark.parametrize("case", LATENTS, ids=str)
def test_latents(case, folder):
    good = {
        "prompt": "a",
        "chosen_latents": [[[0.0, 0.0], [0.0, 1.0]]],
        "rejected_latents": [[[0.0, 0.0], [0.0, 2.0]]],
    }
    rows = stream_of(good, {**good, "rejected_latents": case.make(folder)})
    assert case.refused in check_data(rows, QUIET).listed["bad_rows"][0].reason
    with expected(case, "row 1"):
        check_preference_dataset(rows)
    with expected(case, "row 1"):
        list(StreamingPreferenceDataset(rows))


def outside(folder):
    """All files of the folder above, but not those of the folder itself."""
    return {path for path in folder.parent.rglob("*") if folder not in path.parents}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", TABLES, ids=str)
def test_tables(case, streaming, folder, monkeypatch):
    path = case.make(folder)
    monkeypatch.chdir(folder)
    before = outside(folder)
    with expected(case):
        rows = load_preference_dataset(path, streaming=streaming)
        check_preference_dataset(rows)
    assert outside(folder) == before


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_all_commands_say_the_same_of_a_table(case, folder, capsys, monkeypatch):
    """What a table cannot be read for ends them before any model is loaded."""
    path = case.make(folder)
    monkeypatch.chdir(folder)
    status = main(["data", "check", str(path), "--strict", "--output", "out"])
    printed = capsys.readouterr().err
    assert status == (0 if case.refused is None else 2) and "Traceback" not in printed
    assert case.refused is None or case.refused in printed
    try:
        load_preference_dataset(path)
    except DatasetError:
        commands = (["encode", "--output", "cache"], ["dpo", "--output_dir", "run", "--bf16", "false"])
        for command in commands:
            named = ["--model_name_or_path", "some/model", "--dataset_name", str(path)]
            assert main([*command, *named]) == 2
            assert case.refused in capsys.readouterr().err
        assert not Path("cache").exists()


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A model, images and prompts of all kinds beside good ones, and the cache of what can be read."""
    folder = tmp_path_factory.mktemp("hostile")
    tiny_stable_diffusion().save_pretrained(folder / "model")
    rows = []
    for number, case in enumerate(IMAGES):
        (folder / "pairs" / str(number) / "data").mkdir(parents=True)
        name = f"{number}/data/{case.make(folder / 'pairs' / str(number) / 'data')}"
        rows.append({"prompt": f"image {number}", "chosen": name, "rejected": "good.png"})
    texts = [case for case in PROMPTS if isinstance(case.make(folder), str) and "surrogate" not in case.what]
    good_image(folder / "pairs")
    good_image(folder / "pairs", "other.png")
    rows += [{"prompt": case.make(folder), "chosen": "other.png", "rejected": "good.png"} for case in texts]
    (folder / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Encoded(folder / "model", folder / "pairs", folder / "cache", {"height": 16, "width": 16, "num_frames": 1})
    return found, [number for number, case in enumerate([*IMAGES, *texts]) if case.refused]


def listed(file):
    return [json.loads(line)["row"] for line in file.read_text().splitlines()]


def test_the_commands_list_and_leave_out_the_same_rows(encoded, tmp_path, capsys, monkeypatch):
    """Everything at once: the check lists what encoding leaves out, and training takes all else."""
    encoded, bad_rows = encoded
    signal.alarm(5 * SECONDS)
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", str(encoded.pairs), "--output", "checked"]) == 0
    assert listed(tmp_path / "checked" / "bad_rows.jsonl") == bad_rows
    assert "<script>" not in (tmp_path / "checked" / "report.html").read_text(encoding="utf-8")
    encoded.encode("--skip_broken", "--max_broken", "1")
    assert listed(encoded.cache / "bad_rows.jsonl") == bad_rows
    training = ["dpo", "--model_name_or_path", str(encoded.model), "--use_cpu", "true", "--max_steps", "2"]
    training += ["--per_device_train_batch_size", "16", "--use_peft", "true", "--resolution", "16"]
    training += ["--output_dir", "run", "--report_to", "none"]
    pairs = ["--dataset_name", str(encoded.pairs)]
    capsys.readouterr()
    assert main([*training, *pairs]) == 2
    printed = capsys.readouterr().err
    assert int(re.search(r"row (\d+)", printed)[1]) in bad_rows and "Traceback" not in printed
    assert main([*training, *pairs, "--skip_rows", "checked/bad_rows.jsonl"]) == 0
    assert main([*training, "--dataset_name", str(encoded.cache)]) == 0
    assert sorted(os.listdir(tmp_path)) == ["checked", "run"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A small cache."""
    folder = tmp_path_factory.mktemp("cache")
    tiny_stable_diffusion().save_pretrained(folder / "model")
    good_image(folder)
    row = {"chosen": "good.png", "rejected": "good.png"}
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"prompt": p, **row}) + "\n" for p in ("a cat", "a dog")))
    size = {"height": 16, "width": 16, "num_frames": 1}
    return Encoded(folder / "model", folder / "pairs.jsonl", folder / "cache", size).encode()


@pytest.mark.parametrize("case", CACHES, ids=str)
def test_caches(case, cache, folder):
    shutil.copytree(cache, folder / "cache")
    case.make(folder / "cache")
    with pytest.raises(DatasetError) as found:
        list(load_preference_dataset(folder / "cache"))
    assert str(folder / "cache") in str(found.value) and case.refused in str(found.value)


def test_the_documentation_says_what_happens():
    """Each group is a table under a heading of its name."""
    page = read(SOURCE / "hostile_input.md")
    for name, cases in GROUPS.items():
        section = page.split(f"### {name}\n")[1].split("\n#")[0]
        rows = [tuple(line.strip("| ").split(" | ")) for line in section.splitlines() if line.startswith("| ")]
        assert rows == [("input", "what happens"), *((case.what, case.happens) for case in cases)], name
