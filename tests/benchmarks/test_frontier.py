# SPDX-License-Identifier: Apache-2.0
"""The frontier: areas against other ways to compute them, what tuning chooses, what freezing refuses, the files."""

import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sipo.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]
BASE = {"accuracy": 0.8, "second_accuracy": 0.8, "reward": -0.5, "frechet_distance": 10.0, "diversity": 1.2}
UNIT_POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def area(script):
    return script("beyond.area")


@pytest.fixture(scope="module")
def frontier(script):
    return script("frontier")


# The plane.


def _by_integration(points, cells=200):
    """Share of a fine grid's cells whose middle some point dominates."""
    middles = (np.arange(cells) + 0.5) / cells
    is_dominated = np.zeros((cells, cells), dtype=bool)
    for x, y in points:
        is_dominated |= (middles[:, None] <= x) & (middles[None] <= y)
    return is_dominated.mean()


@settings(max_examples=25, deadline=None)
@given(UNIT_POINTS)
def test_the_area_is_that_of_an_integration(script, points):
    assert script("beyond.area").dominated_area(np.array(points)) == pytest.approx(_by_integration(points), abs=1.1e-2)


@settings(max_examples=25, deadline=None)
@given(UNIT_POINTS, st.tuples(st.floats(0, 1), st.floats(0, 1)), st.randoms(use_true_random=False))
def test_a_point_never_takes_area_away_and_order_does_not_matter(script, points, point, chance):
    dominated_area = script("beyond.area").dominated_area
    before = dominated_area(np.array(points))
    assert dominated_area(np.array([*points, point])) >= before - 1e-12
    chance.shuffle(points)
    assert dominated_area(np.array(points)) == pytest.approx(before)


@settings(max_examples=25, deadline=None)
@given(UNIT_POINTS)
def test_the_frontier_alone_has_the_whole_area(script, points):
    area, points = script("beyond.area"), np.array(points)
    is_on = area.on_frontier(points)
    assert area.dominated_area(points * is_on[:, None]) == pytest.approx(area.dominated_area(points))
    for one in points[is_on]:
        assert not ((points >= one).all(1) & (points > one).any(1)).any()


def test_areas_of_many_draws_are_those_of_each(area):
    points = np.random.default_rng(0).random((6, 5, 2))
    assert area.dominated_area(points) == pytest.approx([area.dominated_area(one) for one in points])
    assert (area.on_frontier(points) == [area.on_frontier(one) for one in points]).all()


@pytest.mark.parametrize(
    ("measured", "quality", "point"),
    [
        ((0.5, 10.0, 0.8, 1.2), "frechet_distance", (0, math.log(4) / math.log(8))),  # the base
        ((1.0, 5.0, 0.8, 1.2), "frechet_distance", (1, 1)),
        ((1.0, 1.0, 0.8, 1.2), "frechet_distance", (1, 1)),
        ((0.75, 40.0, 0.8, 1.2), "frechet_distance", (0.5, 0)),
        ((0.75, 4000.0, 0.8, 1.2), "frechet_distance", (0.5, 0)),
        ((0.75, math.nan, 0.8, 1.2), "frechet_distance", (0.5, 0)),
        ((0.2, 20.0, 0.8, 1.2), "frechet_distance", (0, 1 / 3)),  # loses against the base
        ((0.6, 10.0, 0.7, 1.2), "second_accuracy", (0.2, 0.7)),
        ((0.6, 10.0, 0.7, 0.6), "diversity", (0.2, 0.5)),
        ((0.6, 10.0, 0.7, 2.4), "diversity", (0.2, 1)),  # noise is no merit
    ],
)
def test_a_policy_lies_where_the_protocol_says(area, measured, quality, point):
    assert area.on_plane(np.array(measured), BASE, quality) == pytest.approx(point)


# Runs to points.


def _rows(setting, seed, win_rates, losses=(), rewards=()):
    rows = []
    for position, win_rate in enumerate(win_rates):
        about = {"setting": setting, "seed": seed, "step": 10 * (position + 1), "win_rate": win_rate}
        extra = {"held_out_loss": (*losses, *[1.0] * 9)[position], "reward": (*rewards, *[0.0] * 9)[position]}
        rows.append({**about, "frechet_distance": 10.0, "second_accuracy": 0.8, "diversity": 1.2, **extra})
    return rows


def test_points_are_of_the_seeds_that_all_settings_have(script):
    points_of = script("beyond.points").points_of
    rows = [*_rows("a", 0, [0.6, 0.7]), *_rows("a", 1, [0.8, 0.9]), *_rows("b", 1, [0.5, 0.4])]
    points = points_of(rows)
    assert points.seeds == (1,) and points.policies == (("a", 10), ("a", 20), ("b", 10), ("b", 20))
    assert points.means[:, 0].tolist() == [0.8, 0.9, 0.5, 0.4]
    assert points_of([*_rows("a", 0, [0.6]), *_rows("b", 1, [0.6])]) is None and points_of([]) is None


def test_every_run_is_stopped_by_its_own_criterion(script):
    stopped_early = script("beyond.points").stopped_early
    rows = _rows("a", 0, [0.6, 0.7, 0.8], losses=[0.5, 0.3, math.nan], rewards=[-1, -2, -3])
    rows += _rows("a", 1, [0.1, 0.2, 0.3], losses=[0.5, 0.5, 0.6], rewards=[-3, -2, -1])
    by_loss, by_reward = (stopped_early(rows, name) for name in ("stopped by loss", "stopped by reward"))
    assert by_loss.policies == by_reward.policies == (("a", 0),)
    assert by_loss.values[0, :, 0].tolist() == [0.7, 0.1] and by_reward.values[0, :, 0].tolist() == [0.6, 0.3]


# How sure areas are.


def _points(script, means, noise, seeds, generator):
    """Policies at means of (win rate, Frechet distance), with noise of the win rate that differs between seeds."""
    values = np.tile([0.5, 10.0, 0.8, 1.2], (len(means), seeds, 1))
    values[..., :2] = np.array(means)[:, None]
    values[..., 0] += noise * generator.standard_normal((len(means), seeds))
    policies = tuple((f"{number}", 1) for number in range(len(means)))
    return script("beyond.points").Points(policies, tuple(range(seeds)), values)


def test_a_crossfit_area_is_the_plain_one_where_seeds_agree(script):
    inference = script("beyond.inference")
    points = _points(script, [(0.6, 10.0), (0.8, 20.0), (0.55, 30.0)], 0.0, 5, np.random.default_rng(0))
    one = np.ones((1, 5))
    # By hand: x of 0.2 up to the base's quality, and from there to 0.6 at half of it.
    assert inference.plain_area(points, BASE, one) == pytest.approx(0.2 * 2 / 3 + 0.4 / 3)
    assert inference.crossfit_area(points, BASE, one) == pytest.approx(inference.plain_area(points, BASE, one))
    assert inference.resampled_area(points, BASE).estimate.error == 0.0


def test_more_policies_of_no_merit_raise_the_plain_area_more_than_the_crossfit_one(script):
    """All policies are alike: what more of them seem to gain is luck."""
    inference, generator, one = script("beyond.inference"), np.random.default_rng(1), np.ones((1, 4))
    few, many = (
        np.mean(
            [
                [float(compute(points, BASE, one)[0]) for compute in (inference.plain_area, inference.crossfit_area)]
                for points in (_points(script, [(0.7, 10.0)] * number, 0.05, 4, generator) for _ in range(30))
            ],
            axis=0,
        )
        for number in (1, 12)
    )
    plain, crossfit = many - few
    assert plain > 0.04 and abs(crossfit) < plain / 5


def test_a_resample_counts_every_seed_as_often_as_it_has_it(script):
    inference = script("beyond.inference")
    draws = inference.draws_of(5)
    assert (draws.sum(axis=1) == 5).all() and ((draws > 0).sum(axis=1) >= 2).all() and len(draws) > 1900
    points = _points(script, [(0.6, 10.0), (0.8, 25.0)], 0.05, 3, np.random.default_rng(2))
    twice = inference.plain_area(points, BASE, np.array([[2, 1, 0]]))
    repeated = points.of_seeds([0, 1])
    values = np.concatenate([repeated.values, repeated.values[:, :1]], axis=1)
    as_rows = replace(repeated, seeds=(0, 1, 2), values=values)
    assert twice == pytest.approx(inference.plain_area(as_rows, BASE, np.ones((1, 3))))


def test_the_interval_of_one_policy_is_students(script):
    """Of one policy in the middle the area is linear in its win rate: a mean, for which the interval is known."""
    from scipy.stats import sem, t

    inference = script("beyond.inference")
    points = _points(script, [(0.75, 10.0)], 0.02, 6, np.random.default_rng(3))
    found = inference.resampled_area(points, BASE).estimate.as_record()
    win_rates = points.values[0, :, 0]
    height = 2 * math.log(4) / math.log(8)
    half = height * t.ppf(0.975, 5) * sem(win_rates)
    assert found["value"] == pytest.approx(height * (win_rates.mean() - 0.5), rel=0.02)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)


def test_differences_are_paired_and_cells_independent(script):
    inference = script("beyond.inference")
    first = _points(script, [(0.7, 10.0)], 0.05, 5, np.random.default_rng(4))
    better = replace(first, values=first.values + np.array([0.05, 0, 0, 0]))
    areas = [inference.resampled_area(points, BASE) for points in (first, better)]
    difference = areas[1].minus(areas[0]).estimate
    assert difference.value == pytest.approx(0.1 * 2 / 3) and difference.error < 1e-9 < areas[0].estimate.error
    one = inference.Estimate(0.2, 0.01, 4)
    both = inference.mean_of([one, replace(one, value=0.4)])
    assert both.value == pytest.approx(0.3) and both.error == pytest.approx(0.01 / math.sqrt(2))
    assert both.degrees == pytest.approx(8)
    assert inference.mean_of([one, inference.Estimate(0.4)]).error is None
    assert one.p == pytest.approx(inference.mean_of([one]).p) and 0 < one.p < 1e-4


@pytest.mark.slow
def test_intervals_cover_the_true_area(script):
    inference, generator = script("beyond.inference"), np.random.default_rng(5)
    means = [(0.6, 9.0), (0.75, 14.0), (0.9, 25.0), (0.65, 30.0)]
    truth = inference.plain_area(_points(script, means, 0.0, 1, generator), BASE, np.ones((1, 1)))[0]
    covered = 0
    for _ in range(300):
        found = inference.resampled_area(_points(script, means, 0.02, 5, generator), BASE).estimate.as_record()
        covered += found["low"] <= truth <= found["high"]
    assert covered / 300 >= 0.92  # of 0.95: less by more than two standard errors


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
    labels = [(arm.method, arm.label) for arm in protocol.ARMS]
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
    for cell in result["cells"].values():
        for method in cell["methods"].values():
            assert 0 <= method["area"]["frechet_distance"]["value"] <= 1
            assert all(policy["win_rate"] > 0.5 for policy in method["frontier"])
    _the_same_from_the_evidence(frontier, place)


def _the_same_from_the_evidence(frontier, place):
    before = (place.root / "frontier.json").read_text()
    evidence = place.root / "runs.json"
    shutil.rmtree(place.root / "runs")
    frontier.main(_words(place, "report", "--evidence", str(evidence)))
    assert (place.root / "frontier.json").read_text() == before and evidence.stat().st_size < 200_000


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
    assert plan.named_cells([plan.LONG], quick=False) == []
    with pytest.raises(ConfigurationError, match="'weak': no such cell; known are 'main', 'more', 'long', 'shipped"):
        plan.named_cells(["weak"], quick=False)


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
    for text in ("{", "{}", '{"runs": [[0]], "columns": [], "cells": [], "arms": [], "bases": {}, "missing": []}'):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match="no whole JSON|no evidence"):
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
