# SPDX-License-Identifier: Apache-2.0
"""The guard stops a run whose held-out numbers pass a bound, and the best checkpoint is what is left."""

import logging

import pytest
from transformers import TrainerControl, TrainerState

from tests.trainer.runs import DPO, changed, logged, make_config, make_trainer, preference_pairs, trained_weights
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.divergence_guard import DivergenceGuard


def _diverging(tmp_path, **options):
    """A full fine-tuning whose learning rate is far too high: the error on held-out pairs grows within a few steps."""
    defaults = {
        "learning_rate": 1e-2,
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "beta": 5000.0,
    }
    held_out = {"eval_dataset": preference_pairs(4, seed=3)}
    return make_trainer(DPO, tmp_path, is_lora=False, trainer_options=held_out, **{**defaults, **options})


@pytest.mark.parametrize("bound", [{"max_drift": 0.06}, {"max_margin_fall": 0.5}], ids=lambda bound: next(iter(bound)))
@pytest.mark.parametrize("falls_back", [True, False], ids=["best", "stays"])
def test_a_diverging_run_is_stopped(bound, falls_back, tmp_path, caplog):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies"} if falls_back else {}
    rate = {"max_drift": 1e-2, "max_margin_fall": 2e-3}[next(iter(bound))]
    trainer = _diverging(tmp_path, learning_rate=rate, **options, **bound)
    with caplog.at_level(logging.WARNING, logger="trl_sipo.trainer.divergence_guard"):
        trainer.train()
    step = trainer.state.global_step
    assert 2 <= step < 8
    (record,) = caplog.records
    message, (name, value) = record.getMessage(), next(iter(bound.items()))
    assert message.startswith(f"Step {step}: training stops, since `eval_") and f"`{name}={value:g}`" in message
    key = "eval_drift/chosen_error" if name == "max_drift" else "eval_rewards/margins"
    values = logged(trainer, key)
    passed = (
        [drift > value for drift in values]
        if name == "max_drift"
        else [max(values[: i + 1]) - margin > value for i, margin in enumerate(values)]
    )
    assert passed == [False] * (len(values) - 1) + [True]
    if not falls_back:
        assert "The weights stay as they are" in message and "`load_best_model_at_end=True`" in message
        return
    best = trainer.state.best_model_checkpoint
    if best is None:
        assert "No earlier evaluation has a checkpoint" in message
        return
    assert f"The weights of the best checkpoint, {best}" in message and best != str(tmp_path / f"checkpoint-{step}")
    loaded = trained_weights(trainer)
    again = _diverging(tmp_path / "again")
    again._load_from_checkpoint(best)
    assert not changed(loaded, trained_weights(again))


def test_without_bounds_nothing_is_stopped(tmp_path):
    trainer = _diverging(tmp_path, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert not any(isinstance(callback, DivergenceGuard) for callback in trainer.callback_handler.callbacks)


def _evaluate(guard, step, **metrics):
    """One evaluation within a run; returns whether training goes on."""
    args = make_config(DPO, "nowhere")
    state, control = TrainerState(is_world_process_zero=True, global_step=step), TrainerControl()
    guard.on_evaluate(args, state, control, metrics=metrics)
    return not control.should_training_stop


def _started(guard):
    guard.on_train_begin(None, TrainerState(), TrainerControl())
    return guard


def test_bounds_are_those_of_each_dataset():
    guard = _started(DivergenceGuard(max_drift=0.1, max_margin_fall=0.5))
    assert _evaluate(guard, 1, **{"eval_a_rewards/margins": 1.0, "eval_a_drift/chosen_error": 0.1})
    assert _evaluate(guard, 1, **{"eval_b_rewards/margins": 0.2, "eval_b_drift/chosen_error": -0.4})
    assert _evaluate(guard, 2, **{"eval_a_rewards/margins": 0.5}) and not guard.has_diverged
    # One level alone, and another metric, are no reason.
    assert _evaluate(guard, 3, **{"eval_a_rewards/margins/time_0.31": -9.0, "eval_a_drift/rejected_error": 9.0})
    assert not _evaluate(guard, 4, **{"eval_a_rewards/margins": 0.49}) and guard.has_diverged
    assert guard.best_margins == {"eval_a_rewards/margins": 1.0, "eval_b_rewards/margins": 0.2}


def test_a_second_run_has_a_best_margin_of_its_own():
    """As with a lower learning rate, after the first was stopped: its weights are where that one left them."""
    guard = _started(DivergenceGuard(max_drift=None, max_margin_fall=0.5))
    assert _evaluate(guard, 1, **{"eval_rewards/margins": 2.0})
    assert not _evaluate(guard, 2, **{"eval_rewards/margins": 1.0})
    assert _evaluate(_started(guard), 1, **{"eval_rewards/margins": 1.0})
    guard.on_train_begin(None, TrainerState(global_step=2), TrainerControl())
    assert guard.best_margins == {"eval_rewards/margins": 1.0}, "resumed: what the checkpoint holds is there already"


def test_outside_of_a_run_it_stops_nothing():
    guard = DivergenceGuard(max_drift=0.1, max_margin_fall=None)
    assert _evaluate(guard, 0, **{"eval_drift/chosen_error": 1.0})
    _started(guard)
    guard.on_train_end(None, None, None)
    assert _evaluate(guard, 0, **{"eval_drift/chosen_error": 1.0}) and not guard.has_diverged


def test_the_best_margin_is_continued(tmp_path):
    options = {"max_margin_fall": 1e6, "learning_rate": 1e-3, "max_steps": 4}
    trainer = _diverging(tmp_path, **options)
    trainer.train()
    best = max(logged(trainer, "eval_rewards/margins"))
    resumed = _diverging(tmp_path, **{**options, "max_steps": 6})
    taken_up = []
    load_state_dict = resumed.divergence_guard.load_state_dict
    resumed.divergence_guard.load_state_dict = lambda state: taken_up.append(state) or load_state_dict(state)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert taken_up == [{"best_margins": {"eval_rewards/margins": best}}]
    assert resumed.divergence_guard.best_margins["eval_rewards/margins"] >= best


def test_an_evaluation_that_stops_is_never_the_best(tmp_path):
    """Chosen by the drift itself, the larger the better, the diverged checkpoint would be loaded."""
    options = {"metric_for_best_model": "drift/chosen_error", "greater_is_better": True}
    trainer = _diverging(tmp_path, max_drift=0.06, load_best_model_at_end=True, **options)
    trainer.train()
    drift = logged(trainer, "eval_drift/chosen_error")
    assert drift[-1] == max(drift) > 0.06
    assert trainer.state.best_model_checkpoint != str(tmp_path / f"checkpoint-{trainer.state.global_step}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drift": 0.0, "eval_strategy": "steps"}, "`max_drift` must be a positive and finite number, got 0.0"),
        ({"max_margin_fall": float("nan"), "eval_strategy": "steps"}, "`max_margin_fall` must be a positive"),
        ({"max_drift": "0.1", "eval_strategy": "steps"}, "got '0.1'"),
        ({"max_drift": True, "eval_strategy": "steps"}, "got True"),
        ({"max_drift": 0.1}, "`max_drift=0.1` looks at held-out pairs, but nothing is evaluated.*`eval_strategy`"),
        ({"max_margin_fall": 1.0}, "remove `max_margin_fall`"),
    ],
)
def test_settings_that_make_no_sense(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        make_config(DPO, tmp_path, **options)
