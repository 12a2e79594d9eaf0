# SPDX-License-Identifier: Apache-2.0
"""A file of a checkpoint that is torn, hostile or of another kind ends in an error that names it and the way out."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import SIPO, make_trainer, preference_pairs
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.checkpoint_files import (
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_to_resume,
    last_complete_checkpoint,
    why_not_resumable,
)
from trl_sipo.trainer.checkpoint_reading import check_training_state

OPTIONS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "mask_redraws": 1, "max_margin_fall": 1.0}
TENSORS = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny pipeline on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


def _trainer(folder, base):
    data = {"eval_dataset": preference_pairs(2, seed=5)}
    stream = preference_pairs(8).to_iterable_dataset()
    return make_trainer(
        SIPO, folder, model=base, pairs=stream, eval_strategy="steps", eval_steps=1, trainer_options=data, **OPTIONS
    )


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3, without manifests; tests damage copies of them."""
    folder = tmp_path_factory.mktemp("run")
    _trainer(folder, base).train()
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / MANIFEST_FILE).unlink()
        # As under float16, which a CPU does not offer.
        torch.save(torch.amp.GradScaler("cpu").state_dict(), checkpoint / "scaler.pt")
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """The folder of the run, to be damaged, and its second checkpoint."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run" / "checkpoint-2"


def _halve(file: Path, bomb: Bomb) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "torn": _halve,
    "empty": lambda file, bomb: os.truncate(file, 0),
    "zeros": lambda file, bomb: file.write_bytes(b"\0" * file.stat().st_size),
    "text": lambda file, bomb: file.write_text("not found\n"),
    "bomb": lambda file, bomb: torch.save({"state": bomb}, file),
    "old_bomb": lambda file, bomb: torch.save({"state": bomb}, file, _use_new_zipfile_serialization=False),
    "list": lambda file, bomb: torch.save([1, 2], file),
    "other": lambda file, bomb: torch.save({"last_epoch": "two", "python": 3, "scale": -1.0, "state": {}}, file),
    "folder": lambda file, bomb: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_with_the_checkpoint_before_it(damage, name, copy, tmp_path):
    check_training_state(copy)
    DAMAGES[damage](copy / name, Bomb(tmp_path / "gone_off"))
    with pytest.raises(ConfigurationError) as caught:
        check_training_state(copy)
    said = str(caught.value)
    assert f"{copy} cannot be continued from: {name} is damaged" in said
    assert f"resume_from_checkpoint={copy.with_name('checkpoint-1')}" in said
    assert "weights_only" not in said, "no advice to switch the check off"
    assert ("mkdir" in said) == ("bomb" in damage) and not (tmp_path / "gone_off").exists()


JSON_FILES = (STATE_FILE, "run_state.json", "stream_position.json", "level_memory.json")


@pytest.mark.parametrize("name", [*TENSORS, *JSON_FILES, MANIFEST_FILE, "adapter.safetensors"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(name, copy):
    """Nor one that a link leads to."""
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy.parent / "pipe")
    (copy / name).symlink_to(copy.parent / "pipe")
    with pytest.raises(ConfigurationError, match=f"its {name} is no file"):
        checkpoint_to_resume(copy.parent, str(copy))
    assert last_complete_checkpoint(copy.parent) == copy.with_name("checkpoint-3")


def test_a_link_to_a_folder_is_no_part_of_a_checkpoint(copy, tmp_path):
    """What lies there may be anything, and is not looked through. Files are links in the caches of the hub."""
    (copy / "vae").symlink_to(tmp_path)
    assert "its folder vae is a link" in why_not_resumable(copy)


def test_what_a_link_leads_to_is_not_copied(base, copy, tmp_path):
    (copy / "scaler.pt").unlink()
    (tmp_path / "secret").write_text("nobody may see this")
    for name in ("README.md", "more.txt", "more.safetensors"):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(tmp_path / "secret")
    _trainer(tmp_path / "again", base).train(resume_from_checkpoint=str(copy))
    written = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert (tmp_path / "again" / "checkpoint-3" / "optimizer.pt") in written
    assert not [path for path in written if b"nobody may see" in path.read_bytes()]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_state_that_is_missing_is_not_replaced_by_a_new_one(name, copy):
    """As transformers would do, without a word."""
    (copy / name).unlink()
    with pytest.raises(ConfigurationError, match=f"{name} .*it is missing"):
        check_training_state(copy)


def test_without_an_earlier_checkpoint_the_error_says_so(copy):
    shutil.rmtree(copy.with_name("checkpoint-1"))
    (copy / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="no earlier complete checkpoint"):
        check_training_state(copy)


def test_a_run_that_is_given_a_damaged_state_ends_before_it_begins(base, copy):
    (copy / "optimizer.pt").write_bytes(b"")
    trainer = _trainer(copy.parent, base)
    trainer.get_train_dataloader = None  # is not come to
    with pytest.raises(ConfigurationError, match=r"optimizer\.pt is damaged"):
        trainer.train(resume_from_checkpoint=str(copy))


# File -> (where a value is put, the value, the field that the error names). A place of `()` is the whole file.
NAN, INFINITE = float("nan"), float("inf")
WRONG = {
    "stream_position.json": [
        ((), [], "it holds"),
        ((), {"epoch": 0}, "steps"),
        (("epoch",), "0", "epoch"),
        (("epoch",), -1, "epoch"),
        (("epoch",), True, "epoch"),
        (("steps",), 1.5, "steps"),
        (("steps",), 3, "steps"),  # more than the run had
        (("steps",), 10**30, "steps"),
        (("passes",), 1, "passes"),
    ],
    "level_memory.json": [
        ((), {}, "it holds"),
        ((), [1.0] * 49, "it holds"),
        ((0,), NAN, "[0]"),
        ((0,), INFINITE, "[0]"),
        ((0,), -0.5, "[0]"),
        ((49,), "1", "[49]"),
        ((49,), None, "[49]"),
        ((49,), 1e300, "[49]"),
    ],
    "run_state.json": [
        ((), None, "it holds"),
        ((), {}, "loss"),
        (("loss",), 3, "loss"),
        (("loss",), {}, "loss.since_log"),
        (("loss", "since_log"), [], "loss.since_log"),
        (("loss", "since_log"), [NAN], "loss.since_log[0]"),
        (("loss", "total"), INFINITE, "loss.total"),
        (("loss", "first_step"), -1, "loss.first_step"),
        (("loss", "last_logged_step"), 3, "loss.last_logged_step"),
        (("loss", "seconds"), "long", "loss.seconds"),
        (("last_step",), [1.0], "last_step"),
        (("last_step", 1), NAN, "last_step[1]"),
        (("epoch_has_ended",), 0, "epoch_has_ended"),
        (("is_training",), "yes", "is_training"),
        (("callbacks",), [], "callbacks"),
        (("callbacks", "Unknown"), 3, "callbacks.Unknown"),
        (("callbacks", "MetricsCallback"), {}, "callbacks.MetricsCallback.metrics"),
        (("callbacks", "MetricsCallback", "metrics"), {"loss": 3}, "callbacks.MetricsCallback.metrics.loss"),
        (("callbacks", "MetricsCallback", "skipped_steps"), -5, "callbacks.MetricsCallback.skipped_steps"),
        (("callbacks", "MetricsCallback", "masked_in_step"), [2], "callbacks.MetricsCallback.masked_in_step[0]"),
        (("callbacks", "DivergenceWarningCallback", "drift"), ["1"], "callbacks.DivergenceWarningCallback.drift[0]"),
        (("callbacks", "DivergenceGuard", "best_margins"), {"eval": NAN}, "best_margins.eval"),
    ],
    "trainer_state.json": [
        ((), [], "it holds"),
        ((), {"epoch": 1.0}, "global_step"),
        (("global_step",), "2", "global_step"),
        (("global_step",), 2.0, "global_step"),
        (("global_step",), -2, "global_step"),
        (("global_step",), 1000, "global_step"),  # the folder says 2
        (("epoch",), NAN, "epoch"),
        (("log_history",), {}, "log_history"),
        (("log_history",), [3], "log_history[0]"),
        (("best_metric",), "good", "best_metric"),
        (("best_global_step",), -1, "best_global_step"),
        (("best_model_checkpoint",), 7, "best_model_checkpoint"),
        (("stateful_callbacks",), [], "stateful_callbacks"),
        (("stateful_callbacks", "TrainerControl"), {"args": 3}, "stateful_callbacks.TrainerControl"),
        (("total_flos",), INFINITE, "total_flos"),
        (("new_field",), 1, "new_field"),
    ],
}


@pytest.fixture(scope="module")
def resuming(base, run, tmp_path_factory):
    """A trainer that reads checkpoints as far as to the first step, again and again."""
    return _trainer(tmp_path_factory.mktemp("resuming"), base)


def _read(trainer, checkpoint):
    """All that is read of a checkpoint but the weights."""
    check_training_state(checkpoint)
    trainer._init_training_state(3, 3, 1, str(checkpoint), None)


def _changed(value, place, new):
    if not place:
        return new
    inside = value[place[0]] if len(place) > 1 else None
    value[place[0]] = _changed(inside, place[1:], new)
    return value


@pytest.mark.parametrize(
    ("name", "place", "value", "field"),
    [pytest.param(name, *case, id=f"{name}-{case[2]}-{case[1]!r:.20}") for name in WRONG for case in WRONG[name]],
)
def test_a_wrong_value_is_named_with_its_file_and_field(name, place, value, field, copy, resuming):
    file = copy / name
    file.write_text(json.dumps(_changed(json.loads(file.read_text()), place, value)))
    with pytest.raises(ConfigurationError) as caught:
        _read(resuming, copy)
    said = str(caught.value)
    assert f"{name} is damaged" in said and f"resume_from_checkpoint={copy.with_name('checkpoint-1')}" in said
    assert field in said.split(": ", 2)[2]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '"\udcff"', "1" * 5000], ids=range(5))
def test_what_is_no_json_is_named(content, name, copy, resuming):
    (copy / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigurationError, match=name):
        _read(resuming, copy)


def test_sound_checkpoints_are_read(copy, resuming):
    for step in (1, 2, 3):
        _read(resuming, copy.with_name(f"checkpoint-{step}"))


def test_a_state_of_another_run_is_told_from_a_damaged_one(base, copy):
    other = make_trainer(SIPO, copy.parent, model=base, optim="sgd", **OPTIONS | {"max_margin_fall": None})
    (copy / "scaler.pt").unlink()
    state = torch.load(copy / "optimizer.pt", weights_only=True)
    state["param_groups"] = state["param_groups"][:1]
    torch.save(state, copy / "optimizer.pt")
    with pytest.raises(ConfigurationError, match=r"optimizer\.pt and scheduler\.pt of .*do not fit this run"):
        other.train(resume_from_checkpoint=str(copy))
