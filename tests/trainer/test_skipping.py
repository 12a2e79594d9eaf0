# SPDX-License-Identifier: Apache-2.0
"""`on_nonfinite="skip"`: a step that is not finite leaves no trace but a count."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from tests.trainer.runs import DPO, SIPO, changed, logged, make_config, make_trainer, preference_pairs, trained_weights
from trl_sipo.errors import ConfigurationError, NumericalError
from trl_sipo.trainer.level_memory import NUM_PARTS, latest_weights

NAN = float("nan")


class _States(TrainerCallback):
    """Weights and optimiser state after every step."""

    def __init__(self):
        self.weights, self.optimizer = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        self.optimizer.append(copy.deepcopy(optimizer.state_dict()["state"]))


def _run(tmp_path, broken_calls=(), *, method=SIPO, factor=NAN, before=None, **options):
    """A run of which these forward passes (from 1) are not finite; the trainer and its states."""
    states = _States()
    settings = {"on_nonfinite": "skip", "max_steps": 5, "learning_rate": 1e-2, **options}
    trainer = make_trainer(method, tmp_path, trainer_options={"callbacks": [states]}, **settings)
    pair_errors, calls = trainer.pair_errors, []

    def broken(*args, **kwargs):
        calls.append(pair_errors(*args, **kwargs))
        is_broken = len(calls) in broken_calls and calls[-1].chosen.requires_grad
        return dataclasses.replace(calls[-1], chosen=calls[-1].chosen * factor) if is_broken else calls[-1]

    trainer.pair_errors = broken
    if before is not None:
        before(trainer)
    trainer.train()
    return trainer, states


def _is_same_state(one, other):
    assert one.keys() == other.keys()
    pairs = ((value, other[key][name]) for key, state in one.items() for name, value in state.items())
    return all(torch.equal(torch.as_tensor(value), torch.as_tensor(other)) for value, other in pairs)


def _check_skipped(states, step):
    """Step `step` (from 1) moved neither weights nor moments nor the count of updates; its neighbours did."""
    weights, optimizer = states.weights, states.optimizer
    assert not changed(weights[step - 2], weights[step - 1]) and _is_same_state(
        optimizer[step - 2], optimizer[step - 1]
    )
    assert changed(weights[step - 1], weights[step]) and changed(weights[step - 3], weights[step - 2])
    assert all(value.isfinite().all() for value in weights[-1].values())


@pytest.mark.parametrize(
    ("factor", "optim", "is_lora"),
    [
        (NAN, "adamw_torch", True),
        (float("inf"), "adamw_torch", False),
        (NAN, "adamw_torch_fused", True),
        (NAN, "adafactor", True),
    ],
)
def test_a_skipped_step_leaves_weights_and_optimiser_as_they_are(factor, optim, is_lora, tmp_path):
    trainer, states = _run(tmp_path, [3], factor=factor, optim=optim, is_lora=is_lora)
    _check_skipped(states, 3)
    assert trainer.state.global_step == 5
    assert logged(trainer, "sipo/skipped_steps") == [0, 0, 1, 1, 1]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    trainer, states = _run(tmp_path, [4], max_steps=6, use_cpu=False, bf16=None)
    _check_skipped(states, 4)
    assert trainer.recorder.is_deferred and logged(trainer, "sipo/skipped_steps")[-1] == 1


def test_the_gradient_alone(tmp_path):
    def before(trainer):
        name, parameter = next(
            (n, p) for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n
        )
        parameter.register_hook(lambda gradient: gradient * (NAN if trainer.state.global_step == 2 else 1))

    trainer, states = _run(tmp_path, before=before)
    _check_skipped(states, 3)
    assert logged(trainer, "sipo/skipped_steps")[-1] == 1


def test_one_micro_batch_drops_the_whole_step(tmp_path):
    """Its second part of two; what the first gave is gone too."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer, states = _run(tmp_path, [6], **options)
    _check_skipped(states, 3)
    # The others are what they are without the break: the same data, in the same order.
    _, sound = _run(tmp_path, **options)
    assert not changed(states.weights[1], sound.weights[1])


def test_the_log_is_that_of_the_steps_that_were_taken(tmp_path):
    """A log of a skipped step alone has no loss; one of several has the mean of the others."""
    trainer, _ = _run(tmp_path / "each", [3], max_steps=4, logging_steps=1)
    loss = logged(trainer, "loss")
    assert [math.isnan(value) for value in loss] == [False, False, True, False]
    assert math.isfinite(logged(trainer, "train_loss")[0])
    assert "rewards/margins" not in [row for row in trainer.state.log_history if row.get("step") == 3][0]
    both, _ = _run(tmp_path / "both", [3], max_steps=4, logging_steps=4)
    taken = [0, 1, 3]
    assert logged(both, "loss")[0] == pytest.approx(sum(loss[i] for i in taken) / 3, rel=1e-5)
    assert logged(both, "sipo/skipped_steps") == [1]
    sound, _ = _run(tmp_path / "sound", max_steps=4, on_nonfinite="raise")
    assert logged(sound, "loss")[:2] == pytest.approx(loss[:2], rel=1e-6)


def test_it_is_warned_of_and_ends_at_the_limit(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_sipo"), pytest.raises(NumericalError) as caught:
        _run(tmp_path, [2, 3, 4], max_skipped_steps=2)
    notes = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(notes) == 2 and notes[1].startswith("Step 3: ") and "(2 of at most 2)" in notes[1]
    assert "Step 4: " in str(caught.value) and "3 steps were not finite, and `max_skipped_steps=2`" in str(
        caught.value
    )
    with pytest.raises(NumericalError, match="Step 2: .* 1 steps were not finite, and `max_skipped_steps=0`"):
        _run(tmp_path, [2], max_skipped_steps=0)


def test_the_count_is_continued(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_skipped_steps": 1}
    _run(tmp_path, [2], max_steps=3, **options)
    resumed = make_trainer(SIPO, tmp_path, on_nonfinite="skip", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(resumed, "sipo/skipped_steps")[-1] == 1
    again = make_trainer(SIPO, tmp_path, on_nonfinite="skip", max_steps=4, **options)
    again.compute_pair_loss = lambda logit, weight, keep: logit * NAN
    with pytest.raises(NumericalError, match="Step 4: .*2 steps were not finite"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class _Interrupt(TrainerCallback):
    """Ctrl-C in the middle of the first accumulated batch, once."""

    is_over = False

    def on_substep_end(self, args, state, control, **kwargs):
        if not self.is_over:
            self.is_over = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("is_deferred", [False, True], ids=["at_once", "deferred"])
def test_a_run_after_an_interrupted_one_begins_anew(policy, is_deferred, tmp_path):
    """As in a notebook: neither the broken part that was left nor the counts are those of the new run."""
    rows = {}
    for name, callbacks in (("again", [_Interrupt()]), ("sound", [])):
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "mask_redraws": 1}
        trainer = make_trainer(
            SIPO,
            tmp_path / name,
            on_nonfinite=policy,
            max_steps=2,
            trainer_options={"callbacks": callbacks},
            **options,
        )
        trainer.recorder.is_deferred = is_deferred
        if callbacks:
            sound_loss = trainer.compute_pair_loss
            if policy == "skip" or is_deferred:  # else the part raises before the interruption
                trainer.compute_pair_loss = lambda logit, weight, keep: logit * NAN
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.compute_pair_loss = sound_loss
        trainer.train()
        rows[name] = [logged(trainer, key) for key in ("loss", "rewards/margins", "sipo/masked_fraction")]
    assert rows["again"] == rows["sound"] and all(len(values) == 2 for values in rows["again"])


def test_a_second_run_has_counts_of_its_own(tmp_path):
    trainer, _ = _run(tmp_path, [2], max_steps=3, max_skipped_steps=1)
    assert logged(trainer, "sipo/skipped_steps")[-1] == 1
    trainer.train()
    assert logged(trainer, "sipo/skipped_steps")[-1] == 0


def test_evaluation_raises_all_the_same(tmp_path):
    evaluated = preference_pairs(4, seed=3)
    trainer = make_trainer(DPO, tmp_path, on_nonfinite="skip", trainer_options={"eval_dataset": evaluated})
    trainer.compute_pair_loss = lambda logit, weight, keep: logit * NAN
    with pytest.raises(NumericalError, match="^Evaluation: the loss or the logit is not finite"):
        trainer.evaluate()


def test_a_skipped_step_says_nothing_about_its_noise_levels(tmp_path):
    memories = []

    def before(trainer):
        record = trainer.level_memory.record

        def spy(level, weight, *, ends_step):
            shares = record(level, weight, ends_step=ends_step)
            memories.append(trainer.level_memory.weight.clone())
            return shares

        trainer.level_memory.record = spy

    _run(tmp_path, [3], mask_redraws=2, before=before)
    assert torch.equal(memories[1], memories[2]) and not torch.equal(memories[0], memories[1])
    known = torch.full((NUM_PARTS,), 0.5)
    weights = latest_weights(known, torch.tensor([0, 0, 1]), torch.tensor([0.25, NAN, NAN]))
    assert weights[:3].tolist() == [0.25, 0.5, 0.5]


# ------------------------------------------------------------------------------------------- with a loss scaler


def _with_scaler(**options):
    """float16 as on a GPU: accelerate refuses it on a CPU, where PyTorch has both autocast and scaler."""

    def before(trainer):
        trainer.accelerator.state._mixed_precision = "fp16"
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **options)

    return before


@pytest.fixture(autouse=True)
def _accelerate_as_it_was():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_an_overflow_is_the_scalers_and_counted_once(policy, tmp_path):
    """An infinite gradient under a scale that is too large is left out by the scaler, and not by us."""
    scaler = _with_scaler(init_scale=2.0**40, backoff_factor=2.0**-30)
    trainer, states = _run(tmp_path, before=scaler, on_nonfinite=policy)
    norms = logged(trainer, "grad_norm")
    assert not math.isfinite(norms[0]) and all(math.isfinite(norm) for norm in norms[1:])
    assert all(state["step"] == 0 for state in states.optimizer[0].values())
    assert changed(states.weights[0], states.weights[1])
    skipped = logged(trainer, "sipo/skipped_steps")
    assert skipped == ([0] * 5 if policy == "skip" else [])


def test_an_error_that_is_not_finite_is_ours_under_a_scaler_too(tmp_path):
    trainer, states = _run(tmp_path, [3], before=_with_scaler(init_scale=2.0**8))
    _check_skipped(states, 3)
    assert logged(trainer, "sipo/skipped_steps")[-1] == 1
    with pytest.raises(NumericalError, match="Step 3: the prediction error of the policy"):
        _run(tmp_path, [3], before=_with_scaler(init_scale=2.0**8), on_nonfinite="raise")


def test_a_gradient_that_overflows_at_every_scale_ends_the_run(tmp_path):
    """Else a NaN would pass for an overflow: every step would be left out, for ever."""

    def before(trainer):
        _with_scaler()(trainer)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * NAN)

    with pytest.raises(NumericalError, match="Step 41: the gradient is not finite"):
        _run(tmp_path, before=before, on_nonfinite="raise", max_steps=60, per_device_train_batch_size=1)


# -------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "ignore"}, r"Unknown `on_nonfinite` 'ignore'; known are \['raise', 'skip'\]"),
        ({"on_nonfinite": "skip", "max_skipped_steps": -1}, "zero or more, got -1"),
        ({"on_nonfinite": "skip", "max_skipped_steps": 2.5}, "whole number, got 2.5"),
        ({"max_skipped_steps": 3}, "only acts with `on_nonfinite='skip'`"),
        ({"on_nonfinite": "skip", "optim": "adalomo"}, "contradicts `optim='adalomo'`"),
        ({"on_nonfinite": "skip", "optim": "galore_adamw_layerwise"}, "within the backward pass"),
    ],
)
def test_settings_that_make_no_sense(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        make_config(DPO, tmp_path, **options)


def test_deepspeed_is_refused(tmp_path):
    trainer = make_trainer(DPO, tmp_path)
    trainer.args.on_nonfinite, trainer.is_deepspeed_enabled = "skip", True
    from trl_sipo.trainer.metrics_recorder import make_recorder

    with pytest.raises(ConfigurationError, match="DeepSpeed"):
        make_recorder(trainer, starts_at_reference=True)
    assert trained_weights(trainer)
