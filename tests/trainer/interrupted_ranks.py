# SPDX-License-Identifier: Apache-2.0
"""What `test_interrupted_ranks.py` runs in every process of a group."""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.trainer.resuming import end_of
from tests.trainer.runs import SIPO, make_trainer, preference_pairs
from trl_sipo.errors import CheckpointError, Preempted


def _trainer(folder: Path) -> Any:
    return make_trainer(
        SIPO, folder, pairs=preference_pairs(24), max_steps=7, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=100, logging_steps=4, mask_redraws=1,
    )  # fmt: skip


class _At(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def _finish(trainer: Any, folder: Path, resume: bool) -> None:
    trainer.train(resume_from_checkpoint=resume)
    torch.save(end_of(trainer), folder / f"end-{trainer.args.process_index}.pt")
    trainer.end()


def train(folder: Path) -> None:
    """Without an interruption."""
    _finish(_trainer(folder), folder, resume=False)


def resume(folder: Path) -> None:
    """From the last complete checkpoint."""
    _finish(_trainer(folder), folder, resume=True)


def preempt(folder: Path, steps: dict[int, int]) -> None:
    """Processes receive SIGTERM in different steps, or never; each writes how it left.

    Args:
        steps: By process.
    """
    trainer = _trainer(folder)
    rank = trainer.args.process_index
    if rank in steps:
        trainer.add_callback(_At(steps[rank], lambda: os.kill(os.getpid(), signal.SIGTERM)))
    try:
        trainer.train()
    except Preempted as stop:
        (folder / f"left-{rank}").write_text(f"{stop.code} {stop.step}")


def fill_disk(folder: Path, failing: int) -> None:
    """One process cannot write its part of the checkpoint of step 2; each writes its error, and when it came."""
    trainer = _trainer(folder)
    rank = trainer.args.process_index
    trainer.args.save_steps = 2

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == failing:
        trainer._save_rng_state = full
    began = time.monotonic()
    try:
        trainer.train()
    except CheckpointError as error:
        (folder / f"error-of-{rank}").write_text(f"{time.monotonic() - began:.1f} {error}")
    trainer.end()
