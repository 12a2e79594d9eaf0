# SPDX-License-Identifier: Apache-2.0
"""The frontier: what tuning chooses, what freezing refuses, which runs are made, the files."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from trl_sipo.errors import ConfigurationError, StorageError

ROOT = Path(__file__).resolve().parents[2]
BASE = {"accuracy": 0.8, "second_accuracy": 0.8, "reward": -0.5, "frechet_distance": 10.0, "diversity": 1.2}


@pytest.fixture(scope="module")
def frontier(script):
    return script("frontier")


# What tuning chooses.


def _measured(script, policies):
    """(setting, step) -> (win rate, Frechet distance), of one seed."""
    values = np.array([[[*point, 0.8, 1.2]] for point in policies.values()])
    return script("beyond.points").Points(tuple(policies), (100,), values), BASE


def test_the_settings_that_add_most_are_chosen(script):
    selection = script("beyond.selection")
    cell = _measured(
        script,
        {
            ("lost", 1): (0.4, 9.0),
            ("beaten", 1): (0.6, 20.0),
            ("strong", 1): (0.9, 25.0),
            ("strong", 2): (0.95, 39.0),
            ("mild", 1): (0.7, 10.0),
            ("tiny", 1): (0.71, 10.5),
            ("weak", 1): (0.55, 5.0),
        },
    )
    assert selection.settings_on_frontier(cell) == {"strong", "mild", "tiny", "weak"}
    assert selection.chosen_settings([cell], 3) == [
        "tiny",
        "strong",
        "weak",
    ]  # and not "mild", which "tiny" all but has
    assert selection.one_policy([cell], ["strong", "mild"], at_the_end=True) == ("mild", 1)
    everywhere = selection.one_policy([cell], ["strong"], at_the_end=False)
    assert everywhere == ("strong", 1) and selection.one_policy([cell], ["strong"], at_the_end=True) == ("strong", 2)
    hopeless = _measured(script, {("a", 1): (0.4, 9.0), ("b", 1): (0.3, 5.0)})
    assert selection.chosen_settings([hopeless], 3) == ["a"]
    assert selection.one_policy([hopeless], ["a", "b"], at_the_end=True) == ("b", 1)  # of none that wins, the best


# The command, on records that a formula made.


def _record(run, number):
    """A run whose win rate and Frechet distance rise with its steps, the more the higher its number."""
    chance = random.Random(f"{run.cell.name} {number} {run.seed}")
    rows = []
    for position, step in enumerate(run.measured_at, start=1):
        push = position * (1 + number % 5) / 10
        win_rate = 0.5 + 0.35 * push + chance.gauss(0, 0.01)
        row = {"step": step, "win_rate": win_rate, "accuracy": 0.8, "second_accuracy": 0.8, "reward": -1.0}
        row |= {"frechet_distance": 10 * math.exp(push), "diversity": 1.2 - 0.1 * push, "masked_share": 0.0}
        rows.append({**row, "log_prob": [-0.1] * 4, **({"held_out_loss": 0.7 - push} if number % 3 else {})})
    for row in rows:
        row.setdefault("held_out_loss", math.nan)
    return {"run": asdict(run), "rows": rows, "seconds": 1.0}


@pytest.fixture
def place(script, frontier, tmp_path):
    """A folder with the records of all quick runs but the last of the test; nothing is left to train."""
    plan, protocol = script("beyond.plan"), script("beyond.protocol")
    place = script("beyond.runs").Place(tmp_path / "quick", is_quick=True)
    data = place.root / "data" / "shipped"
    data.mkdir(parents=True)
    (data / "frontier_base.json").write_text(json.dumps({**BASE, "protocol": "0", "log_prob": [0.0]}))
    (place.root / "runs").mkdir()
    runs = [*plan.tuning_runs(quick=True), *plan.test_runs(protocol.ARMS, quick=True), *plan.long_runs(quick=True)]
    runs += plan.settings_runs(protocol.ARMS, quick=True)
    labels = [(arm.method, arm.label) for arm in (*protocol.ARMS, *protocol.MORE_SETTINGS)]
    for run in runs:
        record = _record(run, labels.index((run.arm.method, run.arm.label)))
        place.result(run).write_text(json.dumps({**record, "shared": place.shared(run)}))
    return place


def _words(place, action, *more):
    return [action, "--quick", "--runs", str(place.root.parent), *more]


def _remove_test_runs(script, place):
    for run in script("beyond.plan").test_runs(script("beyond.protocol").ARMS, quick=True):
        place.result(run).unlink(missing_ok=True)


def _freeze(script, frontier, place):
    """Frozen before the test, as it must be; the test runs are put back afterwards."""
    kept = place.root / "kept"
    shutil.copytree(place.root / "runs", kept)
    _remove_test_runs(script, place)
    frontier.main(_words(place, "freeze"))
    shutil.rmtree(place.root / "runs")
    kept.rename(place.root / "runs")


def test_what_is_frozen_is_tested_and_reported(script, frontier, place, capsys):
    frontier.main(_words(place, "tune"))
    num_settings = sum(arm.method == "DPO" for arm in script("beyond.protocol").ARMS)
    assert capsys.readouterr().out.count("| DPO |") == 2 * num_settings * 2  # cells, settings, steps
    _freeze(script, frontier, place)
    arms, frozen = script("beyond.freezing").read(place.root, quick=True)
    methods = {arm.method for arm in script("beyond.protocol").ARMS}
    assert {arm.method for arm in arms} == methods == set(frozen["protocol"]["single"])
    assert all(1 <= sum(arm.method == method for arm in arms) <= 3 for method in methods)
    assert sum(arm.method == "KTO" for arm in arms) == 1
    frontier.main(_words(place, "test"))
    lost = script("beyond.plan").test_runs(arms, quick=True)[-1]
    place.result(lost).unlink()
    frontier.main(_words(place, "report"))
    said = capsys.readouterr()
    assert said.err.count("missing: ") == 1 and lost.arm.label in said.err
    for name in ("frontier", "more_cells", "candidates", "rounds_and_masks", "areas", "long"):
        assert (place.root / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    table = (place.root / "table.md").read_text()
    assert "mean nothing" in table and "Difference from DPO, stopped by loss" in table
    result = json.loads((place.root / "frontier.json").read_text())
    assert result["protocol"] == frozen["digest"] and len(result["missing"]) == 1
    more = result["more_settings"]["compared"]
    assert set(more) == {"DPO", "DPO, stopped by reward", "DPO, stopped by loss", "SIPO", "KTO"}
    tested = result["cells"]["shipped, on_policy"]["methods"]["DPO"]
    assert more["DPO"]["settings"] == tested["settings"] + len(more["DPO"]["added"]) > tested["settings"]
    assert f"| {tested['settings']} + {len(more['DPO']['added'])} | 1 | 2 |" in table.split("Settings added")[1]
    for cell in result["cells"].values():
        for method in cell["methods"].values():
            assert 0 <= method["area"]["frechet_distance"]["value"] <= 1
            assert all(policy["win_rate"] > 0.5 for policy in method["frontier"])
    _the_same_from_the_evidence(frontier, place)


def _the_same_from_the_evidence(frontier, place):
    before = (place.root / "frontier.json").read_text()
    evidence, other = place.root / "runs.json", place.root / "other"
    shutil.rmtree(place.root / "runs")
    frontier.main(_words(place, "report", "--evidence", str(evidence), "--output", str(other)))
    assert (other / "frontier.json").read_text() == before and evidence.stat().st_size < 200_000
    content = json.loads(evidence.read_text())
    for name, value, message in (
        ("protocol", "0", "is of the protocol 0, and protocol.json"),
        ("runs", [], "no test"),
    ):
        evidence.write_text(json.dumps({**content, name: value}))
        with pytest.raises(SystemExit, match=message):
            frontier.main(_words(place, "report", "--evidence", str(evidence)))
    assert (place.root / "frontier.json").read_text() == before


def test_a_test_needs_the_frozen_protocol_and_the_code_that_it_was_frozen_with(script, frontier, place, monkeypatch):
    with pytest.raises(SystemExit, match="freeze` before the test"):
        frontier.main(_words(place, "test"))
    _freeze(script, frontier, place)
    monkeypatch.setattr(script("beyond.protocol"), "MEASURED_AT", (15, 30))
    with pytest.raises(SystemExit, match=r"measured_at is \[15, 30\], was \[15, 30, 60, 120\]"):
        frontier.main(_words(place, "test"))
    monkeypatch.undo()
    monkeypatch.setattr(script("beyond.area"), "FRECHET_WORST", 5.0)
    with pytest.raises(SystemExit, match=r"analysis.frechet_worst is 5.0, was 4.0"):
        frontier.main(_words(place, "report"))
    monkeypatch.undo()
    arms = script("beyond.protocol").ARMS
    monkeypatch.setattr(script("beyond.protocol"), "ARMS", [arm for arm in arms if arm.method != "SFT"])
    with pytest.raises(SystemExit, match="arms that the code has not .SFT"):
        frontier.main(_words(place, "test"))


def test_a_protocol_changed_by_hand_or_torn_is_refused(script, frontier, place):
    _freeze(script, frontier, place)
    path = place.root / "protocol.json"
    content = json.loads(path.read_text())
    content["protocol"]["arms"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="changed after it was frozen"):
        frontier.main(_words(place, "test"))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(SystemExit, match="no frozen protocol"):
        frontier.main(_words(place, "test"))


def test_nothing_is_frozen_after_the_test_but_the_same(script, frontier, place):
    with pytest.raises(SystemExit, match="test runs were made already, and there is no"):
        frontier.main(_words(place, "freeze"))
    _freeze(script, frontier, place)
    path = place.root / "protocol.json"
    before = path.read_text()
    frontier.main(_words(place, "freeze"))
    assert path.read_text() == before
    run = script("beyond.plan").tuning_runs(quick=True)[0]
    record = json.loads(place.result(run).read_text())
    record["rows"][-1] |= {"win_rate": 1.0, "frechet_distance": 1.0}
    place.result(run).write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="another protocol .arms is"):
        frontier.main(_words(place, "freeze"))
    assert path.read_text() == before


def test_nothing_else_is_frozen_where_a_report_has_test_runs_that_are_kept_elsewhere(script, frontier, place):
    _freeze(script, frontier, place)
    frontier.main(_words(place, "report"))
    _remove_test_runs(script, place)
    frontier.main(_words(place, "freeze"))
    (place.root / "protocol.json").unlink()
    with pytest.raises(SystemExit, match="test runs were made already"):
        frontier.main(_words(place, "freeze"))


def test_freezing_needs_every_tuning_run(script, frontier, place):
    place.result(script("beyond.plan").tuning_runs(quick=True)[3]).unlink()
    with pytest.raises(SystemExit, match=r"1 tuning runs are missing .*frontier.py tune"):
        frontier.main(_words(place, "freeze"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test", "--workers", "0"], "at least one process"),
        (["test", "--seeds", "7"], r"\[7\]: the test has \[0, 1, 2, 3, 4\]"),
        (["tune", "--seeds", "0"], "--seeds is of `test`"),
        (["test", "--evidence", "x"], "--evidence is of `report`"),
        (["test", "--runs", __file__], "is a file"),
        (["report", "--quick", "--output", str(ROOT / "reports" / "beyond")], "do not belong into reports"),
    ],
)
def test_options_that_nothing_can_be_made_with_are_refused_first(frontier, words, message):
    with pytest.raises(SystemExit, match=message):
        frontier.main(words)


def test_cells_are_named_by_group_or_by_name(script):
    plan, protocol = script("beyond.plan"), script("beyond.protocol")
    named = plan.named_cells(["weak, off_policy", "more"], quick=False)
    assert named == [protocol.MAIN_CELLS[-1], *protocol.MORE_CELLS]
    assert plan.named_cells([plan.LONG, plan.SETTINGS], quick=False) == []
    with pytest.raises(
        ConfigurationError, match="'weak': no such cell; known are 'main', .*'long', 'settings', 'ship"
    ):
        plan.named_cells(["weak"], quick=False)


def test_words_and_seeds_ask_for_runs(script):
    plan, protocol = script("beyond.plan"), script("beyond.protocol")
    frozen = protocol.ARMS[:4]

    def asked(*words, seeds=protocol.TEST_SEEDS):
        return plan.asked_runs(frozen, words, seeds, quick=False)

    assert asked("main", "more") == plan.test_runs(frozen, quick=False)
    assert asked(plan.LONG) == plan.long_runs(quick=False)
    assert {run.seed for run in asked(plan.LONG, "main", seeds=(2,))} == {2}
    added = asked(plan.SETTINGS)
    assert {run.cell.source for run in added} == {"on_policy"} and all(run.arm not in frozen for run in added)
    assert len(added) == 3 * len(protocol.TEST_SEEDS) * len({run.arm.label for run in added})
    assert asked("main", plan.LONG, plan.SETTINGS) == [*asked("main"), *asked(plan.LONG), *added]
    with pytest.raises(ConfigurationError, match=r"'long' have the seeds \[0, 1, 2\], not \[4\]"):
        asked(plan.LONG, seeds=(4,))


def runs_of_all_arms(protocol, plan):
    return plan.runs_of(protocol.ARMS, [(cell, (0,)) for cell in protocol.MAIN_CELLS], quick=False)


def test_runs_come_seed_by_seed_and_only_where_a_method_is_made(script):
    plan, protocol = script("beyond.plan"), script("beyond.protocol")
    runs = plan.test_runs(protocol.ARMS, quick=False)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len({run.key for run in runs}) == len(runs)
    assert {run.seed for run in runs if run.cell in protocol.MORE_CELLS} == set(protocol.FEW_SEEDS)
    assert {run.cell for run in runs if run.arm.method in protocol.CANDIDATES} == set(protocol.CANDIDATE_CELLS)
    assert all(run.arm.rounds == 1 for run in runs_of_all_arms(protocol, plan) if run.cell.source == "off_policy")
    assert {(run.arm.method, run.arm.label) for run in plan.headline_runs(quick=False)} == set(protocol.HEADLINE_ARMS)
    ends = {run.measured_at for run in plan.long_runs(quick=False)}
    assert ends == {protocol.LONG_MEASURED_AT} and not {run.key for run in plan.long_runs(quick=False)} & {
        run.key for run in runs
    }


def test_evidence_that_is_none_is_refused(frontier, script, tmp_path):
    evidence = script("beyond.evidence")
    with pytest.raises(ConfigurationError, match="no such file"):
        evidence.read(tmp_path / "nothing.json")
    path = tmp_path / "torn.json"
    cell, arm = asdict(script("beyond.protocol").MAIN_CELLS[0]), asdict(script("beyond.protocol").ARMS[0])
    whole = {"protocol": "0", "cells": [cell], "arms": [arm], "columns": [], "missing": [], "bases": {"shipped": BASE}}
    whole["runs"] = [[0, 0, 0, False, 1.0, []]]
    path.write_text(json.dumps(whole))
    assert evidence.read(path).records[0]["run"]["cell"] == cell
    for part in ({"runs": [[0]]}, {"bases": {}}, {"bases": {"shipped": {}}}, {"cells": [{"odd": 1}]}, {"cells": 0}):
        path.write_text(json.dumps({**whole, **part}))
        with pytest.raises(ConfigurationError, match="no evidence .*take it from where it came from"):
            evidence.read(path)
    path.write_text(json.dumps(whole)[:-9])
    with pytest.raises(ConfigurationError, match="no evidence"):
        evidence.read(path)


# What runs share.


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("protocol", "LEARNING_RATE", 1e-5),
        ("protocol", "LORA_RANK", 4),
        ("protocol", "QUICK", None),
        ("runs", "WIN", "of the same starting noise"),
    ],
)
def test_a_record_made_with_other_shared_settings_is_none(script, place, monkeypatch, module, name, value):
    plan, runs, evidence = script("beyond.plan"), script("beyond.runs"), script("beyond.evidence")
    run = plan.tuning_runs(quick=True)[0]
    assert place.has(run)
    other = replace(script("beyond.protocol").QUICK, num_pairs=44) if name == "QUICK" else value
    monkeypatch.setattr(script(f"beyond.{module}"), name, other)
    assert not place.has(run)
    (missing,) = evidence.collect([run], place).missing
    assert "its record is of other shared settings" in missing
    monkeypatch.setattr(runs, "train", lambda run, place: [{"step": 1}])
    runs.make(run, place)
    assert place.has(run) and runs.read_json(place.result(run))["rows"] == [{"step": 1}]
    monkeypatch.setattr(runs, "train", None)
    runs.make(run, place)  # there is nothing to do
    monkeypatch.undo()
    assert not place.has(run)


def test_another_base_or_another_candidate_makes_its_own_runs_anew(script, place, monkeypatch):
    every = script("beyond.plan").tuning_runs(quick=True)
    plain = next(run for run in every if not run.arm.candidate)
    changed = next(run for run in every if run.arm.candidate)
    monkeypatch.setattr(script("beyond.runs"), "CONSTANTS", (0.5,))
    assert place.has(plain) and not place.has(changed)
    base = place.root / "data" / "shipped" / "frontier_base.json"
    base.write_text(base.read_text().replace('"protocol": "0"', '"protocol": "1"'))
    assert not place.has(plain)
    base.unlink()
    assert not place.has(plain)


def test_a_torn_record_is_named(script, place, frontier):
    path = place.result(script("beyond.plan").tuning_runs(quick=True)[0])
    path.write_text(path.read_text()[:-9])
    for action in ("tune", "freeze"):
        with pytest.raises(SystemExit, match=f"{path.name} is no whole JSON .*: delete it"):
            frontier.main(_words(place, action))


# Real training, a step or two long.


def test_a_run_is_trained_measured_and_read_again(script, tmp_path):
    """An arm with a candidate's change, by the code that the pool's processes run."""
    plan, runs, evidence = script("beyond.plan"), script("beyond.runs"), script("beyond.evidence")
    place = runs.Place(tmp_path, is_quick=True)
    place.prepare(["shipped"], 1)
    run = next(run for run in plan.tuning_runs(quick=True) if run.arm.candidate == "loser_anchor")
    run = replace(run, measured_at=run.measured_at[:1])
    runs.make(run, place)
    found = evidence.collect([run], place)
    (rows,) = found.by_cell([run.seed])[run.cell].values()
    assert [row["step"] for row in rows] == list(run.measured_at) and not found.missing
    points = script("beyond.points").points_of(rows)
    assert np.isfinite(points.values).all() and 0 <= points.values[0, 0, 0] <= 1
    evidence.write(found, tmp_path / "runs.json")
    assert evidence.read(tmp_path / "runs.json") == found
    assert 0 < found.bases["shipped"]["frechet_distance"] < math.inf


@dataclass(frozen=True)
class Lethal:
    """In place of a `Place`: what asks it for a record is killed, as for want of memory."""

    def result(self, run):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_training_process_ends_with_advice(script):
    runs = script("beyond.runs")
    with pytest.raises(StorageError, match="was killed, .*fewer --workers than 1. Finished runs are kept"):
        todo = script("beyond.plan").tuning_runs(quick=True)[:1]
        runs.train_in_processes(runs.make, todo, Lethal(), 1, lambda run: None)


@pytest.mark.slow
def test_every_arm_runs_from_tuning_to_the_report(tmp_path):
    """Every arm of the quick protocol and a part of its test; asserts only what holds whatever was measured."""
    part = ["--cells", "shipped, on_policy", "long", "--seeds", "0"]
    for action, more in (("tune", []), ("freeze", []), ("test", part), ("report", []), ("headline", [])):
        words = [sys.executable, "benchmarks/frontier.py", action, "--quick", "--runs", str(tmp_path), *more]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    result = json.loads((tmp_path / "quick" / "frontier.json").read_text())
    assert list(result["cells"]) == ["shipped, on_policy"] and len(result["long"]) == 2 and result["missing"]
    methods = {name.split(", stopped")[0] for name in result["cells"]["shipped, on_policy"]["methods"]}
    assert methods == set(result["single"])
    for method in result["cells"]["shipped, on_policy"]["methods"].values():
        assert all(0 <= area["value"] <= 1 for area in method["area"].values())
