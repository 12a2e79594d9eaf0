# SPDX-License-Identifier: Apache-2.0
"""A full disk, an exception, a torn file: the run's last checkpoint stays, and from it the run ends as planned."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.resuming import differences, end_of
from tests.trainer.runs import DPO, SIPO, changed, make_trainer, predict, preference_pairs, trained_weights
from trl_sipo.errors import CheckpointError, ConfigurationError
from trl_sipo.trainer.checkpoint_files import MANIFEST_FILE, why_not_resumable
from trl_sipo.trainer.checkpointing import copy_weights
from trl_sipo.trainer.run_state import RUN_STATE_FILE

OPTIONS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny pipeline on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The end of a run that nothing happened to."""
    trainer = make_trainer(SIPO, tmp_path_factory.mktemp("whole"), model=base, **OPTIONS)
    trainer.train()
    return end_of(trainer)


def _folders(run_dir: Path) -> list[str]:
    """All but the log, which a run keeps until it ends, however it ends."""
    return sorted(path.name for path in run_dir.iterdir() if path.is_dir() and path.name != "run_log")


def _ends_as_planned(whole, base, run_dir):
    resumed = make_trainer(SIPO, run_dir, model=base, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert differences(whole, end_of(resumed)) == []


class _At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def _limit_files(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes: its writes then fail as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def _no_limit_afterwards():
    yield
    _limit_files(resource.RLIM_INFINITY)


@pytest.mark.parametrize("size", [0, 2000, 20_000], ids=["no_byte", "first_file", "later_file"])
@pytest.mark.usefixtures("_no_limit_afterwards")
def test_a_disk_that_is_full_in_a_write(size, whole, base, tmp_path):
    trainer = make_trainer(SIPO, tmp_path, model=base, **OPTIONS)
    trainer.create_model_card = lambda **kwargs: None  # the first write, but of no consequence
    trainer.add_callback(_At(4, lambda: _limit_files(size)))
    with pytest.raises(CheckpointError, match="checkpoint-4 could not be written") as failure:
        trainer.train()
    _limit_files(resource.RLIM_INFINITY)
    assert _folders(tmp_path) == ["checkpoint-2"] and "MB are free" in str(failure.value)
    assert f"resumed from {tmp_path / 'checkpoint-2'}" in str(failure.value)
    _ends_as_planned(whole, base, tmp_path)


def test_a_disk_that_is_full_when_it_is_synced(whole, base, tmp_path, monkeypatch):
    """Some file systems find room only then."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = make_trainer(SIPO, tmp_path, model=base, **OPTIONS)
    with monkeypatch.context() as patch:
        trainer.add_callback(_At(4, lambda: patch.setattr(os, "fsync", full)))
        with pytest.raises(CheckpointError, match="No space left on device"):
            trainer.train()
    assert _folders(tmp_path) == ["checkpoint-2"]
    _ends_as_planned(whole, base, tmp_path)


def test_a_disk_that_is_full_from_the_start(base, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = make_trainer(SIPO, tmp_path, model=base, **OPTIONS)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        trainer.train()
    assert _folders(tmp_path) == []


@pytest.mark.parametrize("event", ["on_step_end", "on_save", "on_log"])
def test_an_exception_in_a_callback(event, whole, base, tmp_path):
    def fail(self, args, state, control, **kwargs):
        if state.global_step == 4 or event == "on_log":
            raise ZeroDivisionError("of the user")

    trainer = make_trainer(SIPO, tmp_path, model=base, **OPTIONS)
    trainer.add_callback(type("Failing", (TrainerCallback,), {event: fail})())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    saved = ["checkpoint-2", "checkpoint-4"] if event == "on_save" else ["checkpoint-2"]
    assert _folders(tmp_path) == saved
    _ends_as_planned(whole, base, tmp_path)


def test_a_torn_file(whole, base, tmp_path, caplog):
    """The newest checkpoint is passed over, and written anew when the run comes there again."""
    make_trainer(SIPO, tmp_path, model=base, **OPTIONS).train()
    for step in (4, 5):
        file = tmp_path / f"checkpoint-{step}" / "optimizer.pt"
        os.truncate(file, file.stat().st_size // 2)
    trainer = make_trainer(SIPO, tmp_path, model=base, **OPTIONS)
    with pytest.raises(ConfigurationError, match=r"checkpoint-5.*optimizer\.pt has"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    _ends_as_planned(whole, base, tmp_path)
    assert "Passed over the checkpoint" in caplog.text
    assert all(why_not_resumable(tmp_path / name) is None for name in _folders(tmp_path))


def test_a_checkpoint_of_an_earlier_version(whole, base, tmp_path, caplog):
    """It knows nothing of the steps since the last log, but all that the weights depend on."""
    make_trainer(SIPO, tmp_path, model=base, **{**OPTIONS, "max_steps": 2}).train()
    for name in (MANIFEST_FILE, RUN_STATE_FILE):
        (tmp_path / "checkpoint-2" / name).unlink()
    trainer = make_trainer(SIPO, tmp_path, model=base, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert "of an earlier version" in caplog.text
    different = differences(whole, end_of(trainer))
    assert different and all(where.startswith("/log") for where in different)


def test_a_run_that_is_resumed_twice_and_then_made_longer(base, tmp_path):
    """The scheduler is a constant one: another would bend with the number of steps."""
    longer = {**OPTIONS, "max_steps": 7}
    expected = make_trainer(SIPO, tmp_path / "whole", model=base, **longer)
    expected.train()
    for max_steps in (3, 5, 5, 7):
        trainer = make_trainer(SIPO, tmp_path / "run", model=base, **{**longer, "max_steps": max_steps})
        trainer.train(resume_from_checkpoint="auto")
        assert trainer.state.global_step == max_steps  # a run that was at its end takes no further step
    end, wanted = end_of(trainer), end_of(expected)
    # The end of each run is in the log; nothing else tells the two apart.
    end["log"] = [row for row in end["log"] if "train_loss" not in row] + [end["log"][-1]]
    assert differences(wanted, end) == []


def test_the_best_checkpoint_is_named_by_the_place_where_it_stays(base, tmp_path):
    trainer = make_trainer(
        DPO, tmp_path, model=base, **{**OPTIONS, "save_steps": 1, "max_steps": 3}, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_loss", greater_is_better=False, save_total_limit=1,
        trainer_options={"eval_dataset": preference_pairs(4, seed=5)},
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir() and "_saving" not in (best / "trainer_state.json").read_text()
    assert set(_folders(tmp_path)) == {best.name, "checkpoint-3"}


@pytest.mark.parametrize("loads_best", [False, True])
def test_the_last_checkpoint_stays_beside_the_best_one(loads_best, base, tmp_path):
    """transformers would delete it when training ends, though the model is not saved yet."""
    trainer = make_trainer(
        DPO, tmp_path, model=base, max_steps=3, learning_rate=0.0, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss", greater_is_better=False,
        load_best_model_at_end=loads_best, save_total_limit=1, trainer_options={"eval_dataset": preference_pairs(4)},
    )  # fmt: skip
    trainer.train()
    assert _folders(tmp_path) == ["checkpoint-1", "checkpoint-3"] and trainer.args.save_total_limit == 1


def test_a_run_that_was_stopped_between_saving_and_deleting_keeps_to_its_limit(base, tmp_path):
    """It resumes from its last step, where there is nothing more to save."""
    options = {"model": base, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    make_trainer(DPO, tmp_path, **options).train()
    assert _folders(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    make_trainer(DPO, tmp_path, **options, save_total_limit=2).train(resume_from_checkpoint=True)
    assert _folders(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_the_best_checkpoint_is_found_where_the_run_was_moved_to(base, tmp_path):
    """A run that has nothing left to do but to load it."""
    options = {
        "model": base, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_drift/chosen_error", "trainer_options": {"eval_dataset": preference_pairs(4)},
    }  # fmt: skip
    first = make_trainer(DPO, tmp_path / "run", **options, greater_is_better=True)
    first.train()
    (tmp_path / "run").rename(tmp_path / "moved")
    second = make_trainer(DPO, tmp_path / "moved", **options, greater_is_better=True)
    second.train(resume_from_checkpoint=True)
    best = Path(first.state.best_model_checkpoint).name
    assert second.state.best_model_checkpoint == str(tmp_path / "moved" / best)
    assert not changed(trained_weights(first), trained_weights(second))


def test_a_run_that_begins_anew_among_checkpoints_of_another_warns(base, tmp_path, caplog):
    options = {"model": base, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(DPO, tmp_path, **options).train()
    assert "of an earlier run" not in caplog.text
    make_trainer(DPO, tmp_path, **{**options, "max_steps": 1}).train()
    assert "of an earlier run, up to checkpoint-2" in caplog.text


def test_a_model_that_cannot_be_saved_leaves_the_earlier_one(base, tmp_path, monkeypatch):
    trainer = make_trainer(DPO, tmp_path / "run", model=base, is_lora=False)
    trainer.save_model(str(tmp_path / "model"))
    before = predict(trainer.adapter.pipeline)
    trainer.train()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(trainer.adapter.pipeline.vae), "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"model could not be saved to .*No space left.*no earlier checkpoint"):
        trainer.save_model(str(tmp_path / "model"))
    loaded = type(trainer.adapter.pipeline).from_pretrained(tmp_path / "model")
    assert torch.equal(predict(loaded), before) and not list((tmp_path / "model").glob("_*"))


def test_a_push_for_which_there_is_no_room(tmp_path, monkeypatch):
    """The files of the model are copied before they are pushed."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "weights").write_text("new")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="could not be saved to .*No space left"):
        copy_weights(str(tmp_path / "checkpoint-1"), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
