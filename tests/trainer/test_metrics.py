# SPDX-License-Identifier: Apache-2.0
"""What a run logs, recomputed by hand, and the warnings that it raises."""

import dataclasses
import logging
import math

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.trainer.runs import DPO, DPO_CM, METHODS, SIPO, logged, make_trainer
from trl_sipo.errors import NumericalError
from trl_sipo.trainer.callbacks import DivergenceWarningCallback
from trl_sipo.trainer.run_warnings import DRIFT_WINDOW, MASKED_WINDOW
from trl_sipo.trainer.statistics import PairErrors, pair_statistics

TRL_KEYS = {
    "loss", "grad_norm", "learning_rate", "epoch", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip
OUR_KEYS = {
    "rewards/saturated_fraction", "sipo/importance_weight", "sipo/weight", "sipo/clip_fraction",
    "sipo/masked_fraction", "sipo/empty_batches", "drift/chosen_error", "drift/rejected_error",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_training_log_has_all_keys(method, tmp_path):
    trainer = make_trainer(method, tmp_path)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row.keys() >= TRL_KEYS | OUR_KEYS
        assert all(math.isfinite(row[key]) for key in TRL_KEYS | OUR_KEYS) and row["grad_norm"] > 0


def test_statistics_by_hand():
    errors = PairErrors(*torch.tensor([[0.5, 0.2, 0.3], [0.4, 0.2, 0.9], [0.6, 0.2, 0.2], [0.4, 0.2, 0.6]]).unbind())
    logit = 100 * (errors.chosen_logratio - errors.rejected_logratio)
    weights = torch.tensor([0.85, 0.95, 1.2])
    keep = torch.tensor([False, True, True])
    statistics = pair_statistics(errors, logit, weights.log(), weights, keep, beta=100.0, clip_range=0.1)
    expected = {
        "rewards/chosen": [5.0, 0.0, -5.0],  # 100 * (ref - policy) / 2
        "rewards/rejected": [0.0, 0.0, -15.0],
        "rewards/margins": [5.0, 0.0, 10.0],
        "rewards/accuracies": [1.0, 0.5, 1.0],  # an exact tie counts one half
        "rewards/saturated_fraction": [1.0, 0.0, 1.0],  # beyond log 99, about 4.6
        "logps/chosen": [-0.25, -0.1, -0.15],
        "logps/rejected": [-0.2, -0.1, -0.45],
        "sipo/importance_weight": [0.85, 0.95, 1.2],
        "sipo/weight": [0.85, 0.95, 1.2],
        "sipo/clip_fraction": [1.0, 0.0, 1.0],
        "sipo/masked_fraction": [1.0, 0.0, 0.0],
        "drift/chosen_error": [-1 / 6, 0.0, 0.5],
        "drift/rejected_error": [0.0, 0.0, 0.5],
    }
    assert statistics.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(statistics[name], torch.tensor(values), rtol=1e-5, atol=1e-5)


def test_logged_rewards_are_those_of_the_step(tmp_path):
    """The rewards of the log, from the predictions that the step itself made."""
    trainer = make_trainer(DPO, tmp_path, learning_rate=1e-2, beta=300.0, gradient_accumulation_steps=2)
    steps = []
    pair_errors = trainer.pair_errors

    def spy(*args):
        steps.append(pair_errors(*args))
        return steps[-1]

    trainer.pair_errors = spy
    trainer.train()
    assert len(steps) == 6
    for step, (chosen, rejected) in enumerate(
        zip(logged(trainer, "rewards/chosen"), logged(trainer, "rewards/rejected"), strict=True)
    ):
        parts = steps[2 * step : 2 * step + 2]
        for value, policy, reference in ((chosen, "chosen", "ref_chosen"), (rejected, "rejected", "ref_rejected")):
            rewards = torch.cat([300 * (getattr(part, reference) - getattr(part, policy)) / 2 for part in parts])
            assert value == pytest.approx(rewards.mean().item(), abs=1e-6)
    assert logged(trainer, "rewards/chosen")[-1] != 0.0


def test_a_log_is_the_mean_over_its_steps(tmp_path):
    rows = {}
    for every in (1, 2):
        trainer = make_trainer(DPO, tmp_path, max_steps=4, logging_steps=every)
        trainer.train()
        rows[every] = logged(trainer, "logps/chosen")
    means = [sum(rows[1][i : i + 2]) / 2 for i in (0, 2)]
    assert rows[2] == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize(("masked", "expected"), [([0, 1], 0), ([0, 1, 2, 3], 1)], ids=["half", "all"])
def test_an_empty_batch_is_one_whose_every_part_is_masked(masked, expected, tmp_path):
    """Four parts of one pair each are one batch; it is empty when all four are masked."""
    calls = []

    def mask_timesteps(self, pair_log_weight):
        calls.append(len(calls))
        return torch.full_like(pair_log_weight, (calls[-1] % 4) not in masked, dtype=torch.bool)

    subclass = type("Sub", (SIPO.trainer_class,), {"mask_timesteps": mask_timesteps})
    trainer = make_trainer(
        SIPO,
        tmp_path,
        trainer_class=subclass,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    trainer.train()
    assert logged(trainer, "sipo/empty_batches") == [expected, 2 * expected]


def _feed(callback, *rows):
    state = TrainerState(is_world_process_zero=True)
    for step, row in enumerate(rows, start=1):
        state.global_step = step
        callback.on_log(None, state, TrainerControl(), logs={"drift/chosen_error": 0.0, **row})


RISING = [{"drift/chosen_error": 0.02 * step} for step in range(1, 2 * DRIFT_WINDOW)]


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        (RISING, "raise `beta`"),
        ([{"sipo/masked_fraction": 1.0}] * MASKED_WINDOW, "mask_threshold"),
        ([{"rewards/saturated_fraction": 0.8}] * 3, "Lower `beta`"),
        ([{"sipo/empty_batches": 2.0}] * 3, "batch size"),
        ([{**row, "proximal/loss": 0.1} for row in RISING], "raise `proximal_kappa`"),
        ([{"sipo/masked_fraction": 1.0, "proximal/loss": 0.1}] * MASKED_WINDOW, "only the proximal term acts"),
        ([{"sipo/empty_batches": 2.0, "proximal/loss": 0.1}] * 3, "no gradient but that of the proximal term"),
    ],
    ids=[
        "winner_error_rises",
        "all_masked",
        "saturated",
        "empty_batches",
        "winner_error_rises_with_kappa",
        "all_masked_with_kappa",
        "empty_batches_with_kappa",
    ],
)
def test_warns_once_with_advice(rows, advice, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_sipo"):
        _feed(DivergenceWarningCallback(), *rows)
    (record,) = caplog.records
    message = record.getMessage()
    assert advice in message and "Step" in message
    assert ("proximal/loss" in rows[0]) == ("proximal term" in message or "raise `proximal_kappa`" in message)


@pytest.mark.parametrize(
    "rows",
    [
        [{"drift/chosen_error": value} for value in (0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1)],
        [{"drift/chosen_error": 0.0001 * step} for step in range(12)],
        [{"sipo/masked_fraction": 0.9, "rewards/saturated_fraction": 0.3, "sipo/empty_batches": 0}] * 9,
        [{"eval_drift/chosen_error": 9.0}],
        # With one pair a step and a log a step, this is chance.
        [{"sipo/masked_fraction": share} for share in (1.0, 0.0, 1.0, 1.0, 0.0, 1.0)],
    ],
    ids=["up_and_down", "tiny", "healthy", "evaluation", "masked_now_and_then"],
)
def test_does_not_warn_without_reason(rows, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_sipo"):
        _feed(DivergenceWarningCallback(), *rows)
    assert not caplog.records


def test_a_run_whose_pairs_are_all_masked_warns_and_moves_nothing(tmp_path, caplog):
    def compute_importance_weights(self, chosen_error, rejected_error, level):
        return chosen_error * 0 - 9.0, rejected_error * 0 - 9.0

    subclass = type("Sub", (SIPO.trainer_class,), {"compute_importance_weights": compute_importance_weights})
    trainer = make_trainer(SIPO, tmp_path, trainer_class=subclass)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with caplog.at_level(logging.WARNING, logger="trl_sipo"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert logged(trainer, "sipo/empty_batches") == [1, 2, 3] and logged(trainer, "loss") == [0.0] * 3
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("trl_sipo")]
    assert len(messages) == 2 and any("masked" in message for message in messages)


@pytest.mark.parametrize(
    ("sampling", "batch_size", "warns"), [("stratified", 1, 1), ("stratified", 2, 0), ("uniform", 1, 0)]
)
def test_stratified_sampling_of_single_pairs_is_warned_of(sampling, batch_size, warns, tmp_path, caplog):
    make_trainer(DPO, tmp_path, timestep_sampling=sampling, per_device_train_batch_size=batch_size)
    assert sum("plain uniform" in record.getMessage() for record in caplog.records) == warns


def test_the_clip_fraction_counts_with_the_methods_range(tmp_path):
    """Without clipping, with the paper's range."""
    ranges = {method.name: make_trainer(method, tmp_path).clip_range for method in METHODS}
    assert ranges == {"dpo": 0.1, "sipo": 0.1, "dpo_cm": 0.2, "poly_dpo": 0.1}


@pytest.mark.parametrize("method", [SIPO, DPO_CM], ids=lambda method: method.name)
def test_metrics_that_wait_on_the_device_are_those_of_the_steps(method, tmp_path):
    """As on a GPU: read two micro-batches later, or when a step is logged, with the values of reading at once."""
    options = {"max_steps": 7, "logging_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    at_once = make_trainer(method, tmp_path / "at_once", **options)
    deferred = make_trainer(method, tmp_path / "deferred", **options)
    deferred.recorder.is_deferred = True
    fetched = []
    flush = deferred.recorder.flush
    deferred.recorder.flush = lambda: fetched.append(len(deferred.recorder._pending)) or flush()
    for trainer in (at_once, deferred):
        trainer.train()
    # Of the first step all are read, before its update; later two are on their way, and a log reads them too.
    assert [count for count in fetched if count] == [2, 2, 2, 2]
    ours = [key for key in deferred.state.log_history[0] if key.startswith(("rewards/", "sipo/", "drift/", "logps/"))]
    assert len(ours) > 10
    for key in ours:
        assert logged(deferred, key) == logged(at_once, key), key


def test_an_error_that_waits_on_the_device_is_named_before_anything_is_saved(tmp_path):
    options = {"max_steps": 6, "logging_steps": 50, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(DPO, tmp_path, **options)
    trainer.recorder.is_deferred = True
    pair_errors, calls = trainer.pair_errors, []

    def overflowing(*args, **kwargs):
        calls.append(pair_errors(*args, **kwargs))
        factor = float("inf") if len(calls) == 2 else 1.0
        return dataclasses.replace(calls[-1], chosen=calls[-1].chosen * factor)

    trainer.pair_errors = overflowing
    with pytest.raises(NumericalError, match="Step 2: .* for 4 of 4 pairs"):
        trainer.train()
    assert len(calls) == 4 and not list(tmp_path.glob("checkpoint-*"))
