# SPDX-License-Identifier: Apache-2.0
"""What a run knows besides weights, optimiser and step: where it is in its data, and what it has not logged yet.

transformers saves neither, so that a resumed run would average its next log over fewer steps, and skip what is due at
the end of an epoch when it was saved at the last step of it.
"""

import json
import logging
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from trl_sipo.trainer import json_checks as checks
from trl_sipo.trainer.checkpoint_reading import read_json

logger = logging.getLogger(__name__)

RUN_STATE_FILE = "run_state.json"
STREAM_POSITION_FILE = "stream_position.json"


@dataclass(frozen=True)
class StreamPosition:
    """Where a run is in a stream.

    Attributes:
        epoch: Passes that have ended.
        steps: Optimiser steps of the pass that has begun.
    """

    epoch: int
    steps: int


def load_stream_position(checkpoint: str, global_step: int) -> StreamPosition | None:
    """The position that a checkpoint holds; warns, and gives `None`, when it has none.

    Args:
        global_step: Optimiser steps of the checkpoint, of which every pass takes at least one.

    Raises:
        ConfigurationError: It is damaged.
    """
    file, steps = Path(checkpoint, STREAM_POSITION_FILE), checks.count(global_step)
    if file.is_file():
        return StreamPosition(**read_json(file, checks.record({"epoch": steps, "steps": steps})))
    logger.warning(
        "The checkpoint %s does not say where it was in the stream: rows are skipped as in a first pass, so the order "
        "of the data and the noise differ from those of a run that was never interrupted.",
        checkpoint,
    )
    return None


@dataclass(frozen=True)
class LoggedLoss:
    """The running loss of transformers' Trainer.

    Attributes:
        since_log: Its sum over the steps since the last log, one number per process.
        total: Its sum before.
        last_logged_step, first_step: Steps from which the two are counted.
        seconds: That the run has been training.
    """

    since_log: list[float]
    total: float
    last_logged_step: int
    first_step: int
    seconds: float


def _run_state(global_step: int, remembered: dict[str, checks.Check]) -> checks.Check:
    """What `run_state.json` must hold: of so many steps, and with the states of these callbacks where it has them."""
    steps = checks.count(global_step)
    loss = checks.record(
        {
            "since_log": checks.items(checks.number(), 1),
            "total": checks.number(),
            "last_logged_step": steps,
            "first_step": steps,
            "seconds": checks.number(0, checks.LARGEST_COUNT),
        }
    )
    # The gradient of a step that a scaler left out is not finite.
    norm, learning_rate = checks.number(is_finite=False), checks.number(0, torch.finfo(torch.float32).max)

    return checks.record(
        {
            "loss": loss,
            "last_step": checks.row(checks.optional(norm), checks.optional(learning_rate)),
            "epoch_has_ended": checks.flag(),
            "callbacks": checks.table(checks.table(checks.anything()), remembered),
        },
        {"is_training": checks.flag()},  # earlier versions did not say
    )


class RememberedCallback(TrainerCallback, ABC):
    """A callback whose state goes into every checkpoint, and is taken up by a run that is resumed from it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state, of values that JSON can hold; the same on all processes, or only of interest on the first."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what [`state_dict`] gave."""

    def check_state(self, state: Any, name: str) -> str | None:
        """What is wrong with a state that was read from a checkpoint, as a [`~trl_sipo.trainer.json_checks.Check`]."""
        return checks.table(checks.anything())(state, name)


class RunState(TrainerCallback):
    """Counts epochs and steps, and keeps with every checkpoint what else a run needs to go on as if never stopped.

    The epoch, on which the noise of a pair and its crop and flip depend, is told to the trainer: `state.epoch` alone
    will not do, since of a stream it is a guess, and accelerate passes it on to a dataset only when its sampler does
    not take it.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.last_step: tuple[Any, float | None] = (None, None)
        """Norm of the gradient and learning rate of the last step, which the log at the end of an epoch names."""
        self._epoch: int | None = None
        self._steps = 0
        self._ended_epoch: int | None = None
        self._first_epoch = 0
        self._position: StreamPosition | None = None
        self._checkpoint: str | None = None
        self._catches_up = False
        self._saved: dict[str, Any] = {}
        self._seconds_before = 0.0
        self._began = time.time()

    # Saving

    def collect(self) -> dict[str, Any]:
        """What is saved; every process must call it."""
        trainer = self.trainer
        norm, learning_rate = self.last_step
        loss = LoggedLoss(
            since_log=gather_object([float(trainer._tr_loss)]),
            total=trainer._total_loss_scalar,
            last_logged_step=trainer._globalstep_last_logged,
            first_step=trainer._initial_global_step,
            seconds=self._seconds_before + time.time() - self._began,
        )
        return {
            "loss": asdict(loss),
            "last_step": [None if norm is None else float(norm), learning_rate],
            "epoch_has_ended": self._ended_epoch == self._epoch,
            "is_training": trainer.model.training,  # not after an evaluation, until the next step
            "callbacks": {name: callback.state_dict() for name, callback in self._remembered().items()},
        }

    def save(self, collected: dict[str, Any], folder: Path) -> None:
        """Write what [`collect`] gave, and the position in a stream, into a checkpoint."""
        (folder / RUN_STATE_FILE).write_text(json.dumps(collected), encoding="utf-8")
        if self.trainer.reads_stream:
            # The end of a pass that was cut short by `max_steps` is none: a longer run goes on in its middle.
            is_over = collected["epoch_has_ended"] and not self.trainer.control.should_training_stop
            position = StreamPosition(self._epoch + 1, 0) if is_over else StreamPosition(self._epoch, self._steps)
            (folder / STREAM_POSITION_FILE).write_text(json.dumps(asdict(position)), encoding="utf-8")

    def _remembered(self) -> dict[str, RememberedCallback]:
        callbacks = self.trainer.callback_handler.callbacks
        return {
            type(callback).__name__: callback for callback in callbacks if isinstance(callback, RememberedCallback)
        }

    # Resuming

    def start_from(
        self, checkpoint: str | None, start: tuple[int, int], steps_in_epoch: int, num_epochs: int
    ) -> tuple[int, int]:
        """The epoch in which a run begins, and the batches of it that are skipped.

        Args:
            checkpoint: `None` for a new run.
            start: What transformers makes of the two, which is right in the middle of a dataset of known length.
            steps_in_epoch: Optimiser steps of an epoch; of a stream, of the run.
            num_epochs: Of the run.
        """
        self._checkpoint, self._saved = checkpoint, {} if checkpoint is None else self._load(checkpoint)
        is_resumed_stream = checkpoint is not None and self.trainer.reads_stream
        self._position = None
        if is_resumed_stream:
            self._position = load_stream_position(checkpoint, self.trainer.state.global_step)
        if checkpoint is not None:
            start = self._resumed_start(start, steps_in_epoch, num_epochs)
        self._first_epoch = start[0]
        return start

    def _resumed_start(self, start: tuple[int, int], steps_in_epoch: int, num_epochs: int) -> tuple[int, int]:
        args, state, position = self.trainer.args, self.trainer.state, self._position
        all_batches = steps_in_epoch * args.gradient_accumulation_steps
        # Earlier versions did not say; then nothing is done that may have been done.
        has_ended = self._saved.get("epoch_has_ended", True)
        epoch = position.epoch if position else (state.global_step - 1) // steps_in_epoch
        is_done, is_between = state.global_step >= state.max_steps, state.global_step % steps_in_epoch == 0
        if is_done and has_ended:
            return num_epochs, 0
        # No step is left of the epoch, but what is due at its end.
        self._catches_up = is_done or (position is None and is_between and not has_ended)
        if self._catches_up:
            return epoch, all_batches
        if position:
            return epoch, 0 if args.ignore_data_skip else position.steps * args.gradient_accumulation_steps
        return start

    def _load(self, checkpoint: str) -> dict[str, Any]:
        file = Path(checkpoint, RUN_STATE_FILE)
        if file.is_file():
            remembered = {name: callback.check_state for name, callback in self._remembered().items()}
            return read_json(file, _run_state(self.trainer.state.global_step, remembered))
        logger.warning(
            "The checkpoint %s, of an earlier version, does not hold what was not logged yet when it was written: the "
            "next log averages over fewer steps than it says.",
            checkpoint,
        )
        return {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up what the checkpoint holds, or begin anew."""
        self._epoch, self._steps, self._ended_epoch = None, 0, None
        self._began, self._seconds_before, self.last_step = time.time(), 0.0, (None, None)
        if not self._saved:
            return
        trainer, loss = self.trainer, LoggedLoss(**self._saved["loss"])
        since_log = loss.since_log
        is_same_world = len(since_log) == args.world_size
        own_loss = since_log[args.process_index] if is_same_world else sum(since_log) / len(since_log)
        trainer._tr_loss += torch.tensor(own_loss, device=trainer._tr_loss.device)
        trainer._total_loss_scalar, trainer._globalstep_last_logged = loss.total, loss.last_logged_step
        trainer._initial_global_step, self._seconds_before = loss.first_step, loss.seconds
        self.last_step = tuple(self._saved["last_step"])
        for name, callback in self._remembered().items():
            if name in self._saved["callbacks"]:
                callback.load_state_dict(self._saved["callbacks"][name])

    def start_time(self, start_time: float) -> float:
        """When a run would have started that was never interrupted."""
        return start_time - self._seconds_before

    # Counting

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Count."""
        self._steps = 0
        if self._epoch is not None:
            self._epoch += 1
        else:
            self._epoch, self._steps = self._first_epoch, self._position.steps if self._position else 0
        self.trainer.set_epoch(self._epoch)

    def on_step_end(self, args, state, control, **kwargs):
        """Count the optimiser steps of this pass."""
        self._steps += 1

    def on_epoch_end(self, args, state, control, **kwargs):
        """Remember that what is due at the end of the epoch is being done."""
        self._ended_epoch = self._epoch
        if self._catches_up:
            self._catches_up = False
            # All of which transformers does at a step, and there was none.
            self.trainer.model.train(self._saved.get("is_training", True))
            self.trainer._load_rng_state(self._checkpoint)
            control.should_training_stop = state.global_step >= state.max_steps
