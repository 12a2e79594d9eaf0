# SPDX-License-Identifier: Apache-2.0
"""The paper's questions on the embedded model: one for real, a few steps long; cache, resuming, and the page."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from trl_sipo.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "reports" / "paper"


def _two_arms(paper):
    """A question with the two arms of the small beta alone, which are enough to see that it runs."""
    whole = paper("gradient_through_w").QUESTION
    arms = dict(list(whole.arms.items())[:2])
    return replace(whole, arms=arms, pairs=[tuple(arms)])


@pytest.fixture(scope="module")
def asked(paper, tmp_path_factory):
    """A quick question, stopped after its first run and asked again: folder, result, and the runs that were made."""
    runs, question = paper("runs"), _two_arms(paper)
    folder, made, train = tmp_path_factory.mktemp("paper"), [], runs.train
    words = ["--quick", "--seeds", "3", "--workers", "1", "--runs", str(folder)]

    def counted(run, place):
        if len(made) == 1:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(run)
        return train(run, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train", counted)
        with pytest.raises(SystemExit, match="goes on"):
            paper("options").guarded(paper("question").ask, question, words)
        first = {path.name: path.stat().st_mtime_ns for path in (folder / "quick" / "runs").glob("*.json")}
        result = paper("question").ask(question, words)
    return folder / "quick", result, made, first


def test_a_stopped_question_goes_on_with_what_is_missing(asked):
    folder, result, made, first = asked
    assert len(first) == 1 and made[1] == "stopped" and len(made) == 3  # one, a stop, and the other
    assert made[0] != made[2] and made[0].seed == made[2].seed == 3
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "runs").glob("*.json")}
    assert len(kept) == 2 and first.items() <= kept.items()
    assert result == json.loads((folder / "gradient_through_w.json").read_text())


def test_the_result_is_of_the_runs(asked, paper):
    folder, result, made, _ = asked
    assert list(result["arms"]) == list(_two_arms(paper).arms) and result["protocol"]["is_quick"]
    for arm, run in zip(result["arms"].values(), (made[0], made[2]), strict=True):
        record = json.loads(next((folder / "runs").glob(f"{_key(paper, folder, run)}.json")).read_text())["records"][
            -1
        ]
        assert record["step"] == paper("protocol").QUICK_STEPS
        assert len(record["correct"]) == len(record["second_correct"]) == 64
        assert sum(record["second_correct"]) / 64 == pytest.approx(record["second_accuracy"])
        assert arm["final"]["second_accuracy"]["mean"] == record["second_accuracy"]
        assert arm["final"]["second_accuracy"]["low"] is None  # of one seed
    (difference,) = result["comparisons"].values()
    means = [arm["final"]["accuracy"]["mean"] for arm in result["arms"].values()]
    assert difference["accuracy"]["mean"] == pytest.approx(means[0] - means[1])
    picture = folder / "gradient_through_w.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def _key(paper, folder, run):
    place = paper("runs").Workplace(folder, paper("protocol").QUICK)
    return run.key(place.settings, json.loads((folder / "base.json").read_text())["digest"])


def test_a_run_has_a_record_of_its_own_for_whatever_it_depends_on(paper):
    protocol = paper("protocol")
    runs = [
        protocol.arm("SIPO", 2.0),
        protocol.arm("SIPO", 20.0),
        protocol.arm("DPO", 2.0),
        protocol.arm("SIPO", 2.0, source="on_policy"),
        protocol.arm("SIPO", 2.0, steps=50),
        protocol.arm("SIPO", 2.0, flip_rate=0.3),
        protocol.arm("SIPO", 2.0, random_mask=True),
        protocol.with_seed(protocol.arm("SIPO", 2.0), 1, quick=False),
    ]
    keys = [run.key(protocol.SETTINGS, "base") for run in runs]
    keys += [runs[0].key(protocol.QUICK, "base"), runs[0].key(protocol.SETTINGS, "another base")]
    assert len(set(keys)) == len(keys)
    assert protocol.arm("SIPO", 2.0).key(protocol.SETTINGS, "base") == keys[0]


def test_questions_share_runs(paper):
    """The same run by another question's name is the same record."""
    protocol = paper("protocol")
    arms = [paper(name).QUESTION.arms.values() for name in ("ablation", "beta_sensitivity", "threshold_clip")]
    keys = [{run.key(protocol.SETTINGS, "base") for run in runs} for runs in arms]
    assert keys[0] & keys[1] and keys[0] & keys[2]
    assert paper("runs").unique([*arms[0], *arms[0]]) == list(arms[0])


def test_labels_are_exchanged_at_the_rate_and_with_the_seed(paper, asked):
    folder = asked[0]
    runs = paper("runs")
    pairs = Dataset.from_parquet(str(folder / "data" / "pairs" / "off_policy" / "train.parquet"))
    turned = runs.flipped(pairs, 0.25, seed=1)

    def arms(data):
        return [(row["chosen"].tobytes(), row["rejected"].tobytes()) for row in data]

    before, after = arms(pairs), arms(turned)
    changed = [index for index, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    assert len(changed) == round(0.25 * len(pairs)) and all(after[i] == before[i][::-1] for i in changed)
    assert turned.features == pairs.features and turned["prompt"] == pairs["prompt"]
    assert arms(runs.flipped(pairs, 0.25, seed=1)) == after != arms(runs.flipped(pairs, 0.25, seed=2))
    assert runs.flipped(pairs, 0.0, seed=1) is pairs


def test_a_random_mask_keeps_as_many(paper):
    import torch

    class Masked:
        class model:  # noqa: N801
            training = True

        def mask_timesteps(self, weights):
            return weights > 0

    trainer = paper("runs").with_random_mask(Masked, 0)()
    weights = torch.tensor([1.0] * 5 + [-1.0] * 15)
    masks = [trainer.mask_timesteps(weights) for _ in range(20)]
    assert {int(mask.sum()) for mask in masks} == {5} and len({tuple(mask.tolist()) for mask in masks}) > 15
    Masked.model.training = False
    assert trainer.mask_timesteps(weights).equal(weights > 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "at least one process"),
        (["--seeds", "1", "1"], "different numbers"),
        (["--seeds", "-1"], "none below 0"),
        (["--runs", __file__], "is a file"),
        (["--quick", "--output", str(REPORTS)], "do not belong into reports"),
    ],
)
def test_options_that_no_run_can_be_made_with_are_refused_first(words, message, paper):
    question = paper("question")
    with pytest.raises(ConfigurationError, match=message):
        question.ask(paper("ablation").QUESTION, words)


def test_a_page_without_results_says_what_to_run(paper, tmp_path):
    with pytest.raises(SystemExit, match="beta_sensitivity.py"):
        paper("options").guarded(paper("report").main, ["--results", str(tmp_path)])


def test_the_page_is_what_the_results_say(paper, tmp_path):
    report = paper("report")
    report.main(["--results", str(REPORTS), "--output", str(tmp_path), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "README.md").read_text()
    assert page == (REPORTS / "README.md").read_text(), "write it anew: python benchmarks/paper/report.py"
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.count("**") == 2]
    assert len(rows) == len(paper("claims").CLAIMS)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5 and all(cells)
        assert cells[3].strip("*") in report.VERDICTS
    whole = (tmp_path / "page.html").read_text()
    assert whole.count("<figure>") >= 8
    assert all("2 is a tenth of the smallest beta of the paper" in text for text in (page, whole))


def test_a_page_of_quick_runs_says_that_it_means_nothing(paper):
    report = paper("report")
    results = report.load(REPORTS)
    assert "mean nothing" not in report.markdown(results)
    quick = {**results["ablation"], "protocol": {**results["ablation"]["protocol"], "is_quick": True}}
    assert "mean nothing (ablation)" in report.markdown({**results, "ablation": quick})


def test_pictures_and_files_of_the_page_exist(paper):
    page = (REPORTS / "README.md").read_text()
    names = [part.split(")")[0] for part in page.split("](")[1:]]
    assert len(names) > 10
    assert not [name for name in names if not (REPORTS / name).exists()]


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    command = [
        sys.executable,
        "benchmarks/paper/gradient_through_w.py",
        "--quick",
        "--seeds",
        "0",
        "1",
        "--workers",
        "1",
    ]
    command += ["--runs", str(tmp_path)]
    records = tmp_path / "quick" / "runs"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(records.glob("*.json")):
            time.sleep(0.05)
        process.kill()
    first = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 1 <= len(first) < 8
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert len(found) == 8 and first.items() <= found.items()
    result = json.loads((tmp_path / "quick" / "gradient_through_w.json").read_text())
    assert result["seeds"] == [0, 1]
