# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, by which schedulers announce that a machine will be taken away: finish the step, save, and leave."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_bool
from functools import partial
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_sipo.errors import Preempted

logger = logging.getLogger(__name__)


class PreemptionCallback(TrainerCallback):
    """Ends training with a checkpoint and [`Preempted`] when one of the processes has received SIGTERM.

    Each process gets the signal at another time, if at all. So with every optimiser step the processes add up who has
    been asked, and each reads the sum of the step before, which has long been there: nobody waits for the device, and
    all leave after the same step.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._is_asked = False
        self.is_stopping = False
        """Whether the processes have agreed to save and leave."""
        self._checkpoint: str | None = None
        self._sum: _DelayedSum | None = None
        self._needs_workers = RawValue(c_bool, False)  # which the workers of data loaders see too

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take SIGTERM for a request, in the main thread, while training.

        Where the program has a handler of its own, or ignores the signal, that stays. So it does in a run whose
        checkpoints cannot be resumed from.
        """
        args = self.trainer.args
        self._is_asked, self.is_stopping, self._checkpoint = False, False, None
        self._sum = _DelayedSum(self.trainer.accelerator) if args.world_size > 1 else None
        self._needs_workers.value = True
        try:
            with self._handler():
                yield
        finally:
            self._needs_workers.value = False
        if self._is_asked:
            logger.warning("SIGTERM came when training had ended. The program goes on to its end.")

    @contextmanager
    def _handler(self) -> Iterator[None]:
        args = self.trainer.args
        if (
            threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            or args.save_strategy == "no"
            or args.save_only_model
        ):
            yield
            return
        signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        # Nothing else: the signal may have come in the middle of anything, the writing of a checkpoint included.
        self._is_asked = True

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint when the processes have agreed."""
        if self._sum is None:
            self.is_stopping = self._is_asked
        else:
            self.is_stopping |= self._sum.previous_then(self._is_asked) > 0
        if self.is_stopping:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Remember that the checkpoint is there."""
        if self.is_stopping:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self._checkpoint = os.path.join(self.trainer._get_output_dir(trial=None), folder)

    def spare_workers(self, loader: DataLoader) -> DataLoader:
        """Let the workers of a data loader live on, in training, when all processes of a job get SIGTERM, as by Slurm.

        Else they would end at once, and the step that is to be finished would fail for want of data.
        """
        plain = getattr(loader, "base_dataloader", loader)  # within accelerate's
        init = plain.worker_init_fn
        if plain.num_workers > 0 and getattr(init, "func", None) is not _start_worker:
            plain.worker_init_fn = partial(_start_worker, self._needs_workers, init)
        return loader

    def leave_if_saved(self) -> None:
        """Raise [`Preempted`] when all is done that was to be done."""
        if self._checkpoint is not None:
            stop = Preempted(self._checkpoint, self.trainer.state.global_step)
            if self.trainer.is_world_process_zero():
                logger.warning("%s", stop)  # Python prints nothing about a SystemExit
            raise stop


class _DelayedSum:
    """Adds up a number over all processes, without waiting for the device."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self._sum = torch.zeros(())
        self._arrived: torch.cuda.Event | None = None

    def previous_then(self, number: float) -> float:
        """The sum of the previous call; the sum of this call's numbers sets out."""
        if self._arrived is not None:
            self._arrived.synchronize()
        previous = float(self._sum)
        device = self.accelerator.device
        own = torch.tensor(float(number)).to(device, non_blocking=True)
        self._sum = self.accelerator.reduce(own, reduction="sum").to("cpu", non_blocking=True)
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device))
        return previous


def _start_worker(is_needed: Any, init: Any, worker: int) -> None:
    parent = os.getppid()

    def leave_if_not_needed(signum: int, frame: FrameType | None) -> None:
        # After training it is the main process that ends its workers so, and then waits for their end.
        if not is_needed.value or os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGTERM, leave_if_not_needed)
    if init is not None:
        init(worker)
