# SPDX-License-Identifier: Apache-2.0
"""What a run writes down while it goes on: complete, by noise level, and the same whether or not it was stopped."""

import json
import logging
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tests.trainer.resuming import untimed
from tests.trainer.run_logs import SAMPLING, lines, rows
from tests.trainer.runs import DPO, POLY_DPO, SIPO, make_config, make_trainer, preference_pairs, trained_weights
from tests.trainer.test_baselines import KTO, MAPO, SFT, images
from tests.trainer.test_d3po import D3PO, trajectories
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.trainer.noise_levels import evaluation_levels, times_of, timesteps_of

HELD_OUT = {"eval_strategy": "steps", "eval_steps": 2}

ERRORS = {"chosen_error", "rejected_error"}
REFERENCE = {"chosen_ref_error", "rejected_ref_error"}
WEIGHTS = {"importance_weight", "masked"}
CASES = {
    "sipo": (SIPO, None, {*ERRORS, *REFERENCE, *WEIGHTS, "margin"}),
    "dpo": (DPO, None, {*ERRORS, *REFERENCE, *WEIGHTS, "margin"}),
    "poly_dpo": (POLY_DPO, None, {*ERRORS, *REFERENCE, *WEIGHTS, "margin"}),
    "kto": (KTO, images, {*ERRORS, *REFERENCE, "margin"}),
    "sft": (SFT, None, {"chosen_error"}),
    "mapo": (MAPO, None, {*ERRORS, "margin"}),
    "d3po": (D3PO, trajectories, {*ERRORS, *REFERENCE, "margin"}),
}


def _seen_in_training(trainer):
    """Timestep, importance weight, errors and margin of every pair that is trained, filled while training."""
    seen, pair_loss = [], trainer.pair_loss

    def observed(errors, level, label=None):
        loss, statistics = pair_loss(errors, level, label)
        if trainer.model.training:
            of_pair = (level.timestep, errors.chosen, errors.ref_rejected, statistics["sipo/importance_weight"])
            seen.extend(zip(*(value.detach().tolist() for value in of_pair), strict=True))
        return loss, statistics

    trainer.pair_loss = observed
    return seen


def test_levels_of_training_by_hand(tmp_path):
    trainer = make_trainer(SIPO, tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    seen = _seen_in_training(trainer)
    trainer.train()
    written = lines(tmp_path, "levels")
    assert [(line["step"], line["split"]) for line in written] == [(2, "train"), (4, "train")]
    for line, part in zip(written, (seen[:16], seen[16:]), strict=True):
        by_bin = defaultdict(list)
        for timestep, *values in part:
            by_bin[int(timestep) // 50].append(values)
        assert [level["timestep"] for level in line["levels"]] == [50 * part + 24.5 for part in sorted(by_bin)]
        for level, (part, values) in zip(line["levels"], sorted(by_bin.items()), strict=True):
            assert level["time"] == pytest.approx((part + 0.5) / 20) and level["pairs"] == len(values)
            names = ("chosen_error", "rejected_ref_error", "importance_weight")
            assert [level[name] for name in names] == pytest.approx(np.mean(values, axis=0), rel=1e-12)
    assert written[0]["edges"] == [pytest.approx(number / 20) for number in range(21)]


def test_levels_of_an_evaluation_are_those_of_its_metrics(tmp_path):
    trainer = make_trainer(
        SIPO, tmp_path, trainer_options={"eval_dataset": preference_pairs(3, seed=5)}, max_steps=2, **HELD_OUT
    )
    trainer.train()
    (line,) = [line for line in lines(tmp_path, "levels") if line["split"] == "eval"]
    metrics = rows(tmp_path)[-2]
    assert line["step"] == 2 and "edges" not in line and len(line["levels"]) == 3
    for level, time in zip(line["levels"], (1 / 6, 1 / 2, 5 / 6), strict=True):
        assert level["time"] == pytest.approx(time) and level["timestep"] == int(1000 * time) and level["pairs"] == 3
        assert level["margin"] == pytest.approx(metrics[f"eval_rewards/margins/time_{time:.2f}"])
    for name, key, scale in (
        ("importance_weight", "sipo/importance_weight", 1), ("masked", "sipo/masked_fraction", 1),
        ("chosen_error", "logps/chosen", -2), ("rejected_error", "logps/rejected", -2),
    ):  # fmt: skip
        mean = np.mean([level[name] for level in line["levels"]])
        assert mean == pytest.approx(scale * metrics[f"eval_{key}"], rel=1e-6), name


def test_sets_that_are_evaluated_apart_are_written_apart_and_predictions_not_at_all(tmp_path):
    held_out = {"one": preference_pairs(3, seed=5), "two": preference_pairs(2, seed=6)}
    trainer = make_trainer(DPO, tmp_path, trainer_options={"eval_dataset": held_out}, max_steps=2, **HELD_OUT)
    trainer.train()
    trainer.predict(preference_pairs(2, seed=7))
    trainer.evaluate(preference_pairs(2, seed=8), metric_key_prefix="later")
    evaluated = [line for line in lines(tmp_path, "levels") if "edges" not in line]
    pairs = [(line["split"], line["levels"][0]["pairs"]) for line in evaluated]
    assert pairs == [("eval_one", 3), ("eval_two", 2), ("later", 2)]
    assert lines(tmp_path, "starts")[0]["eval_pairs"] == {"one": 3, "two": 2}


# What Diffusion-DPO and Poly-DPO write is what SIPO writes.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("dpo", "poly_dpo"))) for name in CASES]
)
def test_every_method_writes_what_it_has(name, tmp_path):
    method, pairs, names = CASES[name]
    data = None if pairs is None else pairs()
    trainer = make_trainer(method, tmp_path, pairs=data, max_steps=2, logging_steps=2)
    trainer.train()
    (line,) = lines(tmp_path, "levels")
    of_lines = set().union(*line["levels"])
    assert of_lines == names | {"time", "timestep", "pairs"}
    assert sum(level["pairs"] for level in line["levels"]) == 8
    (start,) = lines(tmp_path, "starts")
    assert start["method"] == trainer.method_name and start["beta_description"] == trainer.beta_description
    assert (start["mask_threshold"], start["clip_range"]) == ((0.9, 0.1) if name == "sipo" else (None, None))


def test_of_single_images_the_errors_are_those_of_the_liked_and_of_the_others(tmp_path):
    trainer = make_trainer(KTO, tmp_path, pairs=images(), max_steps=2, logging_steps=2)
    seen, pair_loss = [], trainer.pair_loss

    def observed(errors, level, label=None):
        seen.extend(zip(level.timestep.tolist(), label.tolist(), errors.chosen.tolist(), strict=True))
        return pair_loss(errors, level, label)

    trainer.pair_loss = observed
    trainer.train()
    (line,) = lines(tmp_path, "levels")
    for level in line["levels"]:
        inside = [row for row in seen if int(row[0]) // 50 == int(level["timestep"]) // 50]
        for name, label in (("chosen_error", 1), ("rejected_error", 0)):
            of_arm = [error for _, liked, error in inside if liked == label]
            assert (name in level) == bool(of_arm) and (not of_arm or level[name] == pytest.approx(np.mean(of_arm)))


def test_rows_are_those_of_the_log(tmp_path):
    trainer = make_trainer(DPO, tmp_path)
    trainer.train()
    assert rows(tmp_path) == untimed(trainer.state.log_history)
    assert all(list(row)[:3] == ["step", "epoch", "time"] for row in lines(tmp_path, "metrics"))


def test_a_log_changes_nothing_and_can_be_left_out(tmp_path):
    runs = {is_on: make_trainer(SIPO, tmp_path / str(is_on), run_log=is_on) for is_on in (True, False)}
    for trainer in runs.values():
        trainer.train()
    with_log, without = (trained_weights(runs[is_on]) for is_on in (True, False))
    assert all(torch.equal(with_log[name], without[name]) for name in without)
    assert not (tmp_path / "False" / "run_log").exists()


def test_numbers_that_are_read_later_are_the_same(tmp_path):
    """As on a GPU, where those of a micro-batch are read two later."""
    for is_deferred in (True, False):
        trainer = make_trainer(SIPO, tmp_path / str(is_deferred), max_steps=4, logging_steps=2)
        trainer.recorder.is_deferred = is_deferred
        trainer.train()
    assert lines(tmp_path / "True", "levels") == lines(tmp_path / "False", "levels")


def test_steps_that_are_left_out_are_not_in_the_levels(tmp_path):
    trainer = make_trainer(SIPO, tmp_path, max_steps=4, logging_steps=4, on_nonfinite="skip")
    pair_loss, calls = trainer.pair_loss, []

    def broken(errors, level, label=None):
        loss, statistics = pair_loss(errors, level, label)
        calls.append(level)
        return (loss * math.nan if len(calls) == 2 else loss), statistics

    trainer.pair_loss = broken
    trainer.train()
    (line,) = lines(tmp_path, "levels")
    assert sum(level["pairs"] for level in line["levels"]) == 3 * 4
    assert rows(tmp_path)[0]["sipo/skipped_steps"] == 1


class Stop(TrainerCallback):
    """Ends the process, as far as a test can tell, after a step."""

    class Stopped(Exception):
        pass

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.Stopped


def _stream():
    return preference_pairs(7).to_iterable_dataset().shuffle(seed=3, buffer_size=4)


# The checkpoint falls between two logs, or at the end of an epoch after which a log is due at the same step.
RESUMED = {
    "middle": (SIPO, {"max_steps": 5, "gradient_accumulation_steps": 2, **SAMPLING, "sample_rewards": "sharpness"}),
    "epochs": (DPO, {"logging_strategy": "epoch", "save_steps": 4}),
    "stream": (SIPO, {"mask_redraws": 1, "pairs": _stream}),
    "precomputed": (DPO, {"precompute_ref_log_probs": True, "num_ref_draws": 2}),
}


def _resumable(case, folder, **more):
    method, options = RESUMED[case]
    settings = {
        "max_steps": 7, "per_device_train_batch_size": 2, "logging_steps": 2, "save_strategy": "steps",
        "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2, **options,
    }  # fmt: skip
    settings["pairs"] = settings.get("pairs", preference_pairs)()
    return make_trainer(
        method, folder, trainer_options={"eval_dataset": preference_pairs(3, seed=5), **more}, **settings
    )


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "middle" else pytest.mark.slow) for case in RESUMED]
)
def test_the_log_of_a_resumed_run_is_that_of_one_that_was_never_stopped(case, tmp_path):
    whole = _resumable(case, tmp_path / "whole")
    whole.train()
    assert len(lines(tmp_path / "whole", "levels")) >= 4

    saved = RESUMED[case][1].get("save_steps", 3)
    stopped = _resumable(case, tmp_path / "run", callbacks=[Stop(saved + 1)])
    with pytest.raises(Stop.Stopped):
        stopped.train()
    for name in ("metrics", "levels", "starts"):
        with open(tmp_path / "run" / "run_log" / f"{name}.jsonl", "a") as file:
            file.write('{"step": 5, "los')  # torn, as a full disk or a loss of power leaves it
    _resumable(case, tmp_path / "run").train(resume_from_checkpoint=True)

    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert lines(tmp_path / "run", "levels") == lines(tmp_path / "whole", "levels")
    steps = [start["step"] for start in lines(tmp_path / "run", "starts")]
    assert steps == [0, saved]


def test_a_fresh_run_moves_the_log_and_the_samples_of_an_earlier_one_aside(tmp_path):
    """Also one that draws no samples, beside which those of the earlier one would pass for its own."""
    for number, sampling in enumerate((SAMPLING, {**SAMPLING, "run_log": False}, SAMPLING, {})):
        make_trainer(DPO, tmp_path, **{"max_steps": 1, "seed": number, **sampling}).train()
    for number, name in ((0, "run_log-1"), (2, "run_log-2"), (3, "run_log")):
        first = json.loads((tmp_path / name / "starts.jsonl").read_text().splitlines()[0])
        assert first["settings"]["seed"] == number and first["step"] == 0
    assert len(rows(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.glob("samples*")) == ["samples-1", "samples-2", "samples-3"]
    assert (tmp_path / "samples-2" / "base" / "01.png").is_file()


def test_a_run_that_is_resumed_elsewhere_begins_a_log_there(tmp_path):
    make_trainer(DPO, tmp_path / "one", max_steps=2, save_strategy="steps", save_steps=2).train()
    make_trainer(DPO, tmp_path / "two").train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert [row["step"] for row in rows(tmp_path / "two")] == [3, 3]
    assert [start["step"] for start in lines(tmp_path / "two", "starts")] == [2]


def test_a_loss_of_nan_is_written_as_one(tmp_path):
    trainer = make_trainer(SIPO, tmp_path, max_steps=1, on_nonfinite="skip")
    pair_loss = trainer.pair_loss

    def broken(*args):
        loss, statistics = pair_loss(*args)
        return loss * math.nan, statistics

    trainer.pair_loss = broken
    trainer.train()
    assert lines(tmp_path, "metrics")[0]["loss"] == "NaN"


class Unwritable(TrainerCallback):
    """Lets the levels, and the samples of the second step, be unwritable."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for name in ("run_log/levels.jsonl", "samples/step-000002.png"):
                Path(args.output_dir, name).mkdir()


def test_a_disk_that_fails_costs_lines_and_pictures_but_not_the_run(tmp_path, caplog):
    options = {"max_steps": 4, "logging_steps": 2, "trainer_options": {"callbacks": [Unwritable()]}}
    trainer = make_trainer(DPO, tmp_path, **options, **SAMPLING)
    trainer.train()
    assert trainer.state.global_step == 4 and [row["step"] for row in rows(tmp_path)] == [2, 4, 4]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("The log of the run has gaps" in warning for warning in warnings) == 1
    assert sum("Samples are missing, and training goes on" in warning for warning in warnings) == 1
    assert (tmp_path / "samples" / "step-000004" / "01.png").is_file()


def test_a_run_whose_folder_takes_no_log_trains(tmp_path, caplog):
    (tmp_path / "run_log").symlink_to(tmp_path / "run_log")  # which cannot be followed
    trainer = make_trainer(DPO, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1 and "The run keeps no log" in caplog.text


@pytest.mark.parametrize("schedule", ["vp", "flow", "shifted"])
@pytest.mark.parametrize("timesteps", [None, [100, 700]], ids=["all", "few"])
def test_times_of_training_are_those_of_evaluations(schedule, timesteps, tmp_path):
    schedules = {
        "vp": VPSchedule(torch.linspace(0.999, 0.01, 1000)),
        "flow": FlowSchedule(),
        "shifted": FlowSchedule(3.0, drawn_shift=2.0),
    }
    args = make_config(DPO, tmp_path, timesteps=timesteps, eval_noise_levels=4)
    whole = type("Adapter", (), {"time_range": (0.0, 1.0)})
    for time, level in evaluation_levels(whole, schedules[schedule], args).items():
        timestep = np.array([float(level.timestep)])
        # A schedule of whole timesteps has one for each thousandth, in whose middle it lies.
        assert times_of(timestep, schedules[schedule], args) == pytest.approx(time, abs=6e-4)
        there_and_back = timesteps_of(times_of(timestep, schedules[schedule], args), schedules[schedule], args)
        assert there_and_back == pytest.approx(timestep, rel=1e-6)


def test_new_keys_and_files_are_explained():
    docs = Path(__file__).resolve().parents[2] / "docs" / "source"
    metrics, quickstart = (docs.joinpath(name).read_text(encoding="utf-8") for name in ("metrics.md", "quickstart.md"))
    assert "| `samples/<reward>`, `samples/<reward>_base` |" in metrics
    for name in ("starts.jsonl", "metrics.jsonl", "levels.jsonl", "samples.json"):
        assert name in quickstart
    for name in {*ERRORS, *REFERENCE, *WEIGHTS, "margin", "timestep", "edges", "pairs"}:
        assert f"`{name}`" in metrics, name
