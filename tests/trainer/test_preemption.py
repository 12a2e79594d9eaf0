# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: the step is finished, the run saved, and the process left with a status of its own."""

import multiprocessing
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.children import end, fork, wait_for
from tests.trainer.resuming import differences, end_of
from tests.trainer.runs import DPO, SIPO, make_trainer, preference_pairs
from trl_sipo.errors import Preempted
from trl_sipo.trainer import checkpoint_files, preemption

OPTIONS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 100, "logging_steps": 2}


class _Scheduler(TrainerCallback):
    """Sends SIGTERM in the middle of a step."""

    def __init__(self, step, send=lambda: os.kill(os.getpid(), signal.SIGTERM)):
        self.step, self.send, self.handlers = step, send, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        if state.global_step + 1 == self.step:
            self.send()


def _preempted(trainer, step, **options):
    scheduler = _Scheduler(step, **options)
    trainer.add_callback(scheduler)
    with pytest.raises(Preempted) as stop:
        trainer.train()
    return stop.value


def test_a_preempted_run_goes_on_where_it_was(tmp_path, caplog):
    base = str(tmp_path / "base")
    tiny_stable_diffusion().save_pretrained(base)
    whole = make_trainer(SIPO, tmp_path / "whole", model=base, **OPTIONS)
    whole.train()
    first = make_trainer(SIPO, tmp_path / "run", model=base, **OPTIONS)
    stop = _preempted(first, 3)
    assert (stop.code, stop.step, stop.checkpoint) == (75, 3, str(tmp_path / "run" / "checkpoint-3"))
    assert "after step 3" in str(stop) and isinstance(stop, SystemExit)
    assert str(stop) in caplog.text  # else a script would end without a word
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    second = make_trainer(SIPO, tmp_path / "run", model=base, **OPTIONS)
    second.train(resume_from_checkpoint=True)
    assert differences(end_of(whole), end_of(second)) == []


def test_where_only_the_best_is_saved_too(tmp_path):
    """transformers saves after an evaluation by its metric alone, here in every step."""
    settings = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    data = {"trainer_options": {"eval_dataset": preference_pairs(4)}, "metric_for_best_model": "eval_loss"}
    stop = _preempted(make_trainer(DPO, tmp_path, **{**OPTIONS, **settings, **data}), 3)
    assert stop.step == 3 and checkpoint_files.why_not_resumable(tmp_path / "checkpoint-3") is None


def test_more_signals_while_saving_do_no_harm(tmp_path, monkeypatch):
    publish = checkpoint_files.publish

    def interrupted(checkpoint):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        publish(checkpoint)

    monkeypatch.setattr(checkpoint_files, "publish", interrupted)
    stop = _preempted(make_trainer(DPO, tmp_path, **OPTIONS), 2)
    assert checkpoint_files.why_not_resumable(tmp_path / "checkpoint-2") is None and stop.step == 2


@pytest.fixture
def ctrl_c_interrupts():
    """Also where the tests were started in the background, which makes shells ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_while_saving_leaves_no_part_of_a_checkpoint(tmp_path):
    trainer = make_trainer(DPO, tmp_path, **{**OPTIONS, "save_steps": 2})
    save = trainer._save_rng_state

    def interrupted(folder):
        if trainer.state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        save(folder)

    trainer._save_rng_state = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-2", "run_log"]
    assert checkpoint_files.why_not_resumable(tmp_path / "checkpoint-2") is None


def test_the_programs_own_handler_stays(tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    try:
        trainer = make_trainer(DPO, tmp_path, **OPTIONS)
        trainer.add_callback(_Scheduler(2))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] and trainer.state.global_step == 5


@pytest.mark.parametrize("setting", [{"save_strategy": "no"}, {"save_only_model": True}])
def test_a_run_that_cannot_be_resumed_is_not_watched(setting, tmp_path):
    trainer = make_trainer(DPO, tmp_path, **{**OPTIONS, **setting})
    scheduler = _Scheduler(0)
    trainer.add_callback(scheduler)
    trainer.train()
    assert set(scheduler.handlers) == {signal.SIG_DFL}


def test_in_a_thread_there_is_no_handler(tmp_path):
    trainer = make_trainer(DPO, tmp_path, **{**OPTIONS, "max_steps": 1})
    scheduler = _Scheduler(0)
    trainer.add_callback(scheduler)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1 and scheduler.handlers == [signal.SIG_DFL]


def test_a_signal_after_the_last_step_is_told(tmp_path, caplog):
    trainer = make_trainer(DPO, tmp_path, **{**OPTIONS, "max_steps": 1})

    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    trainer.add_callback(Late())
    trainer.train()
    assert "SIGTERM came when training had ended" in caplog.text


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_sum_over_processes_is_that_of_the_step_before(device):
    """So that on a GPU it has long been there."""
    twice = SimpleNamespace(device=torch.device(device), reduce=lambda value, reduction: value * 2)
    delayed = preemption._DelayedSum(twice)
    assert [delayed.previous_then(number) for number in (0.0, 1.0, 0.0, 3.0, 0.0)] == [0.0, 0.0, 2.0, 0.0, 6.0]


def test_workers_outlive_a_signal_to_the_whole_job(tmp_path):
    """As Slurm sends it. Without workers there would be no data for the step that is to be finished."""
    ready, output = tmp_path / "ready", tmp_path / "output.txt"

    def train():
        options = {**OPTIONS, "max_steps": 200, "dataloader_num_workers": 2, "dataloader_persistent_workers": True}
        trainer = make_trainer(DPO, tmp_path / "run", **options)
        trainer.add_callback(_Scheduler(3, send=ready.touch))
        trainer.train()

    child = fork(train, output, own_group=True)
    assert wait_for(ready, child) is None, output.read_text()[-3000:]
    os.killpg(child, signal.SIGTERM)
    assert end(child, output) == Preempted.STATUS, output.read_text()[-3000:]
    assert checkpoint_files.last_complete_checkpoint(tmp_path / "run") is not None


def test_workers_end_when_the_main_process_ends_them(tmp_path):
    """It does so when a program ends by an error, and waits for them: else it would hang for good."""
    trainer = make_trainer(DPO, tmp_path, **OPTIONS, dataloader_num_workers=1)
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    with pytest.raises(ZeroDivisionError), trainer._preemption.watching():
        worker.terminate()
        worker.join(0.5)
        assert worker.is_alive()
        raise ZeroDivisionError
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
