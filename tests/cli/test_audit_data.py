# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit data` on data that is good, and on data that is deliberately bad in one way each."""

import html
import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.data.clips import write_video
from tests.tiny.wan import tiny_wan
from tests.tiny_models import tiny_stable_diffusion
from trl_sipo.cli.main import main
from trl_sipo.demo.fashion import ASSETS, split_prompts
from trl_sipo.demo.pairs import off_policy_pairs
from trl_sipo.demo.verifier import load_verifiers

FEATURES = datasets.Features(
    {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
)


@pytest.fixture(scope="module")
def photographs():
    """Good pairs, one of each of some prompts: rows of decoded images."""
    made = off_policy_pairs(load_verifiers()[0], split_prompts()[0], pairs_per_prompt=1, seed=0)
    return [{name: row[name] for name in FEATURES} for row in made]


def _stored(image, kind="PNG", **options):
    if isinstance(image, dict):
        return image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def _written(rows, folder, split="train", **columns):
    """The rows as Parquet, images stored as they are if they are files already."""
    folder.mkdir(exist_ok=True)
    stored = [{**row, **{arm: _stored(row[arm]) for arm in ("chosen", "rejected")}} for row in rows]
    table = {name: [row[name] for row in stored] for name in FEATURES}
    dataset = datasets.Dataset.from_dict(table, features=FEATURES)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    dataset.to_parquet(folder / f"{split}.parquet")
    return folder


def _report(folder, output, *options):
    assert main(["audit", "data", "--dataset_name", str(folder), "--output", str(output), *options]) == 0
    return json.loads((output / "data.json").read_text())


def _named(report, name):
    (finding,) = [finding for finding in report["findings"] if finding["name"] == name]
    return finding


# ---------------------------------------------------------------------------------------- deliberately bad, one by one


def identical(rows):
    """Five pairs of the same picture twice."""
    return [{**row, "rejected": row["chosen"]} if place < 5 else row for place, row in enumerate(rows)]


def broken(rows):
    """Two files that break off."""
    damaged = {"bytes": _stored(rows[0]["chosen"])["bytes"][:100], "path": None}
    return [{**row, "chosen": damaged} if place in (3, 7) else row for place, row in enumerate(rows)]


def dominated(rows):
    """Most rows have one prompt."""
    return [{**row, "prompt": "a red bag"} if place % 5 else row for place, row in enumerate(rows)]


def contradictory(rows):
    """Eight pairs twice, the other way round."""
    return rows + [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:8]]


def brighter(rows):
    """What is rejected was darkened."""
    return [{**row, "rejected": ImageEnhance.Brightness(row["rejected"]).enhance(0.4)} for row in rows]


def larger(rows):
    """What is rejected is larger."""
    return [{**row, "rejected": row["rejected"].resize((48, 48))} for row in rows]


def compressed(rows):
    """What is rejected was stored as JPEG."""
    return [{**row, "rejected": _stored(row["rejected"], "JPEG", quality=30)} for row in rows]


def some_compressed(rows):
    """As before, in half of the pairs only."""
    return [
        {**row, "rejected": _stored(row["rejected"], "JPEG", quality=30)} if place % 2 else row
        for place, row in enumerate(rows)
    ]


BAD = {
    identical: ("identical arms", 5, "identical_arms.jsonl"),
    broken: ("broken", 2, "bad_rows.jsonl"),
    dominated: ("one prompt dominates", None, "Leave most of its rows out"),
    contradictory: ("contradictory labels", 8, "contradictory.jsonl"),
    brighter: ("shortcut: brightness", None, "balance it"),
    larger: ("shortcut: pixels", None, "one size and one format"),
    compressed: ("shortcut: is_lossy", None, "one size and one format"),
    some_compressed: ("shortcut: is_lossy", None, "one size and one format"),
}


def test_data_that_is_bad_in_many_ways(photographs, tmp_path, capsys):
    """Each fault is named, with its count and the way out, in the verdict too."""
    data = _written(broken(identical(dominated(photographs))), tmp_path / "bad")
    _written(photographs[-3:], data, "test")
    report = _report(data, tmp_path / "out", "--held_out_split", "test")
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    assert first.startswith("DO NOT TRAIN ON THIS YET: ")
    counts = {"identical arms": 4, "broken": 2, "one prompt dominates": None, "shared with held-out": 3}
    for name, count in counts.items():
        finding = _named(report, name)
        assert finding["severity"] in ("stop", "look") and name in first and finding["way_out"]
        assert f"[{finding['severity']}] {finding['words']}" in printed and f"-> {finding['way_out']}" in printed
        assert html.escape(finding["words"]) in (tmp_path / "out" / "data.html").read_text()
        assert count is None or finding["count"] == count
    lists = {path.name for path in (tmp_path / "out" / "rows").iterdir()}
    assert lists >= {"bad_rows.jsonl", "identical_arms.jsonl", "shared_with_held_out.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_data_is_named_with_counts_and_the_way_out(make, photographs, tmp_path, capsys):
    name, count, way_out = BAD[make]
    rows = make(photographs)
    report = _report(_written(rows, tmp_path / "bad"), tmp_path / "out")
    printed = capsys.readouterr().out
    finding = _named(report, name)
    assert finding["severity"] == "stop" and way_out in finding["way_out"]
    assert printed.startswith("DO NOT TRAIN ON THIS YET: ") and name in printed.splitlines()[0]
    assert f"[stop] {finding['words']}" in printed and f"-> {finding['way_out']}" in printed
    assert html.escape(finding["words"]) in (tmp_path / "out" / "data.html").read_text()
    if count is not None:
        assert finding["count"] == count
    if way_out.endswith(".jsonl"):
        assert len((tmp_path / "out" / "rows" / way_out).read_text().splitlines()) == 2 * count // (
            1 if make is contradictory else 2
        )
    others = {other["name"] for other in report["findings"] if other["severity"] == "stop"} - {name}
    related = {"shortcut: file_bytes", "shortcut: bytes_per_pixel", "shortcut: sharpness", "shortcut: contrast"}
    assert others <= (related | {"shortcut: colourfulness"} if "shortcut" in name else set())


def test_good_data_passes(photographs, tmp_path, capsys):
    report = _report(_written(photographs, tmp_path / "good"), tmp_path / "out")
    assert report["verdict"].startswith("Nothing wrong was found") and report["verdict"] in capsys.readouterr().out
    assert {finding["severity"] for finding in report["findings"]} == {"good"}
    assert report["advice"]["poly_alpha"] is None and "Nothing follows" in report["advice"]["words"]
    assert (tmp_path / "out" / "data.png").read_bytes()[:4] == b"\x89PNG"
    assert report["verdict"] in (tmp_path / "out" / "data.html").read_text()


def test_what_is_shared_with_held_out_pairs(photographs, tmp_path):
    """Two pairs as they are, and a picture within another pair; then none of them, by the list that was written."""
    folder = _written(photographs, tmp_path / "data")
    mixed = {**photographs[6], "prompt": "a green bag", "rejected": photographs[7]["rejected"]}
    _written([photographs[0], photographs[1], mixed], folder, "test")
    report = _report(folder, tmp_path / "out", "--held_out_split", "test")
    finding = _named(report, "shared with held-out")
    assert finding["severity"] == "stop" and finding["count"] == 4 and "2 of them the same pair" in finding["words"]
    lines = (tmp_path / "out" / "rows" / "shared_with_held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 6, 7]

    apart = _written(photographs[10:], tmp_path / "apart")
    other = ["--held_out_name", str(_written(photographs[:5], tmp_path / "held")), "--held_out_split", "train"]
    assert _named(_report(apart, tmp_path / "out", *other), "held-out")["severity"] == "good"
    assert not (tmp_path / "out" / "rows" / "shared_with_held_out.jsonl").exists()


# ----------------------------------------------------------------------------------------------------- labels, rewards

REWARDS = ("--rewards", "fashion", "fashion-second")


def _turned(rows, share):
    """Every so-manieth label turned."""
    swap = {int(place / share) for place in range(round(share * len(rows)))}
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if place in swap else row
        for place, row in enumerate(rows)
    ]


def test_labels_that_are_all_turned(photographs, tmp_path, capsys):
    report = _report(_written(_turned(photographs, 1), tmp_path / "bad"), tmp_path / "out", *REWARDS)
    finding = [finding for finding in report["findings"] if finding["name"] == "turned labels"]
    assert len(finding) == 2 and all(part["severity"] == "stop" for part in finding)  # by either reward
    assert "LESS THAN CHANCE" in capsys.readouterr().out and "which column" in finding[0]["way_out"]
    assert finding[0]["count"] == finding[0]["total"] == len(photographs)
    assert "Turn them around" in report["advice"]["words"]


def test_labels_of_which_some_are_turned(photographs, tmp_path):
    """Both rewards were never wrong here, so that the estimate is the share that was turned."""
    rows = _turned(photographs, 0.3)
    report = _report(_written(rows, tmp_path / "bad"), tmp_path / "out", *REWARDS)
    found = report["turned_labels"]["fashion and fashion-second"]
    assert found["estimate"] == pytest.approx(0.3, abs=0.02) and found["low"] < 0.3 < found["high"]
    assert found["low"] > 0.15 and report["advice"]["poly_alpha"] == 8
    assert report["advice"]["label_smoothing"] == pytest.approx(0.3, abs=0.02)
    assert _named(report, "noisy labels")["severity"] == "look"
    conflicts = {(row["first"], row["second"]): row["conflict"]["estimate"] for row in report["agreements"]}
    assert conflicts["label", "fashion"] == pytest.approx(0.3, abs=0.02)
    assert conflicts["fashion", "fashion-second"] == 0
    assert (tmp_path / "out" / "scores.sqlite").is_file()


def test_columns_of_scores_are_rewards(photographs, tmp_path):
    """One that agrees with every label, one that knows nothing, one half of whose pairs are near-ties."""
    count = len(photographs)
    noise = np.random.default_rng(0).normal(size=(2, count))
    ties = np.where(np.arange(count) % 2, 0.001, 5.0)
    columns = {
        "chosen_good": [1.0] * count,
        "rejected_good": [0.0] * count,
        "chance_chosen": noise[0].tolist(),
        "chance_rejected": noise[1].tolist(),
        "chosen_near": ties.tolist(),
        "rejected_near": [0.0] * count,
        "chosen_id": ["a"] * count,
        "rejected_id": ["b"] * count,
    }
    report = _report(_written(photographs, tmp_path / "data", **columns), tmp_path / "out")
    names = {name for row in report["agreements"] for name in (row["first"], row["second"])}
    assert names == {"label", "good", "chance", "near"}
    assert _named(report, "agreement with good")["severity"] == "good"
    assert _named(report, "chance agreement with chance")["severity"] == "look"
    assert _named(report, "near-ties by near")["severity"] == "look"
    assert report["near_ties"]["near"] == pytest.approx(0.5, abs=0.02)


def test_labels_in_a_column_say_which_arm_is_chosen(tmp_path):
    """Pick-a-Pic's layout: the brighter picture is preferred, in the one column as in the other."""
    rng, rows = np.random.default_rng(0), {"jpg_0": [], "jpg_1": [], "label_0": [], "label_1": [], "caption": []}
    for place in range(24):
        dark, light = (
            _stored(Image.fromarray(rng.integers(low, low + 80, (16, 16, 3), dtype=np.uint8)), "JPEG")["bytes"]
            for low in (0, 120)
        )
        is_first = place % 2
        rows["jpg_0"].append(light if is_first else dark)
        rows["jpg_1"].append(dark if is_first else light)
        rows["label_0"].append(float(is_first))
        rows["label_1"].append(1.0 - is_first)
        rows["caption"].append(f"caption {place}")
    rows |= {"has_label": [True] * 24, "ranking_id": list(range(24))}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "train.parquet")
    report = _report(tmp_path / "data", tmp_path / "out", "--rewards", "brightness")
    finding = _named(report, "shortcut: brightness")
    assert finding["count"] == finding["total"] == 24 and finding["severity"] == "stop"
    assert _named(report, "agreement with brightness")["count"] == 0  # against the label


# ------------------------------------------------------------------------------------------------------------- model


def _seen(folder, output, *options, model=ASSETS / "pipeline", num_levels=4):
    model = ["--model_name_or_path", str(model), "--num_levels", str(num_levels)]
    return _report(folder, output, *model, *options)


def test_captions_that_were_shuffled(photographs, tmp_path, capsys):
    """The demo's model tells its captions apart, as they are; of shuffled ones it cannot."""
    rows = photographs[:40]
    good = _seen(_written(rows, tmp_path / "good"), tmp_path / "one", "--num_pairs", "10", num_levels=2)
    assert _named(good, "captions")["severity"] == "good" and good["implicit"]["captions"]["low"] > 0.6
    assert len(good["implicit"]["levels"]) == 2 and good["settings"]["num_pairs"] == 10
    assert _named(good, "implicit agreement")["severity"] == "good"
    capsys.readouterr()
    prompts = [row["prompt"] for row in rows]
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = [{**row, "prompt": prompts[place]} for row, place in zip(rows, order, strict=True)]
    bad = _seen(_written(shuffled, tmp_path / "bad"), tmp_path / "two", "--num_pairs", "24", num_levels=2)
    finding = _named(bad, "captions do not fit")
    assert finding["severity"] == "stop" and "shuffled" in finding["words"]
    assert "captions do not fit" in capsys.readouterr().out.splitlines()[0]


def test_clips(tmp_path):
    """A tiny Wan, a reward of videos, and rejected clips that are all shorter."""
    tiny_wan().save_pretrained(tmp_path / "wan")
    (tmp_path / "clips").mkdir()
    videos = [
        str(write_video(tmp_path / "clips" / f"{i}.mp4", 9 if i % 2 else 6, size=(32, 32), first=i)) for i in range(8)
    ]
    rows = {"prompt": [f"clip {i}" for i in range(4)], "chosen": videos[1::2], "rejected": videos[::2]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "clips" / "train.parquet")
    options = ("--resolution", "32", "--num_frames", "5", "--rewards", "motion")
    report = _seen(tmp_path / "clips", tmp_path / "out", *options, model=tmp_path / "wan", num_levels=2)
    assert report["rows"]["kind"] == "videos" and report["settings"]["num_frames"] == 5
    (frames,) = [row for row in report["shortcuts"] if row["name"] == "num_frames"]
    assert frames["chosen_has_more"] == frames["num_differing"] == 4
    assert {row["second"] for row in report["agreements"]} == {"motion", "the model"}
    assert report["implicit"]["captions"] is not None and "sigma" in report["implicit"]["levels"][0]


def test_a_cache_answers_what_it_can(photographs, tmp_path, capsys):
    tiny_stable_diffusion().save_pretrained(tmp_path / "sd")
    data = _written(photographs[:4], tmp_path / "data")
    model = ["--model_name_or_path", str(tmp_path / "sd")]
    encoding = ["--resolution", "16", "--output", str(tmp_path / "cache")]
    assert main(["encode", *model, "--dataset_name", str(data), *encoding]) == 0
    report = _seen(tmp_path / "cache", tmp_path / "out", model=tmp_path / "sd", num_levels=2)
    assert _named(report, "cache")["severity"] == "look" and report["rows"] is None
    assert report["implicit"]["agreement"]["estimate"] <= 1 and report["settings"]["height"] == 16
    capsys.readouterr()
    for options, message in [((), "without a model nothing"), (("--rewards", "brightness"), "no pictures to score")]:
        assert main(["audit", "data", "--dataset_name", str(tmp_path / "cache"), *options]) == 2
        assert message in capsys.readouterr().err


MISTAKES = {
    "pairs": (("--num_pairs", "0"), "`--num_pairs` must be at least 1"),
    "lora": (("--lora", "x"), "give `--model_name_or_path`"),
    "reward": (("--rewards", "nothing"), "There is no reward 'nothing'"),
    "options": (("--reward_options", '{"x": {}}'), "are given for x"),
    "split": (("--held_out_split", "tset"), "tset"),
    "video reward": (("--rewards", "motion"), "scores videos"),
    "model": (("--model_name_or_path", "./nothing"), "nothing"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_exit_with_2_in_one_line(case, photographs, tmp_path, capsys):
    options, message = MISTAKES[case]
    assert main(["audit", "data", "--dataset_name", str(_written(photographs[:2], tmp_path / "data")), *options]) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("trl-sipo audit: ")]
    assert message in line and "row/s" not in errors  # before any row is looked at


def test_an_output_that_is_a_file_is_refused_before_anything_is_read(photographs, tmp_path, capsys):
    data = _written(photographs[:2], tmp_path / "data")
    (tmp_path / "file").touch()
    assert main(["audit", "data", "--dataset_name", str(data), "--output", str(tmp_path / "file")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_prompts_and_columns_cannot_steer_the_terminal_or_the_page(photographs, tmp_path, capsys):
    hostile = "\x1b[2J<script>alert(1)</script>"
    rows = [{**row, "prompt": hostile} for row in photographs[:24]]
    scores = {f"chosen_{hostile}": 12 * [5.0, 0.01], f"rejected_{hostile}": 24 * [0.0]}  # half of them near-ties
    report = _report(_written(rows, tmp_path / "data", **scores), tmp_path / "out")
    assert _named(report, "one prompt dominates")["count"] == 24
    assert f"near-ties by {hostile}" in report["verdict"]
    assert "\x1b" not in capsys.readouterr().out
    assert "<script>" not in (tmp_path / "out" / "data.html").read_text()
