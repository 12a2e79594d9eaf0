# SPDX-License-Identifier: Apache-2.0
"""What `test_failing_rank.py` starts in every process: `failing_run.py <output> <failure>`. The second fails."""

import os
import sys
import threading
import time

import torch
from transformers import TrainerCallback

from tests.trainer.runs import DPO, make_trainer, preference_pairs

IS_FAILING = os.environ["RANK"] == "1"


class FailingCallback(TrainerCallback):
    """Raises in the middle of training."""

    def on_step_end(self, args, state, control, **kwargs):
        """After the second of many steps."""
        if IS_FAILING and state.global_step == 2:
            raise RuntimeError("the callback failed")


def fail_in_callback(output: str) -> None:
    """An error of the user's own code."""
    make_trainer(DPO, output, max_steps=100, trainer_options={"callbacks": [FailingCallback()]}).train()


class LeavingCallback(TrainerCallback):
    """Ends the program in the middle of training, as a script of the user's own does."""

    def on_step_end(self, args, state, control, **kwargs):
        """After the second of many steps."""
        if IS_FAILING and state.global_step == 2:
            print("time of failure", time.time(), file=sys.stderr)
            sys.exit(7)


def leave_with_a_thread(output: str) -> None:
    """A `sys.exit` that Python does not carry out before a thread has ended."""
    if IS_FAILING:
        threading.Thread(target=time.sleep, args=(600,)).start()
    make_trainer(DPO, output, max_steps=100, trainer_options={"callbacks": [LeavingCallback()]}).train()


def fail_before_training(output: str) -> None:
    """Data that only one process finds wrong, while the other goes on to the first collective."""
    pairs = preference_pairs(8)
    make_trainer(DPO, output, pairs=pairs.rename_column("chosen", "chosne") if IS_FAILING else pairs).train()


def fail_with_a_thread(output: str) -> None:
    """A thread that never ends, for which Python waits before a program ends."""
    if IS_FAILING:
        threading.Thread(target=time.sleep, args=(600,)).start()
    fail_in_callback(output)


def fail_out_of_memory(output: str) -> None:
    """Inside the forward pass, which is inside autograd and the wrapper for several processes."""
    trainer = make_trainer(DPO, output, max_steps=100)

    def allocate(module, inputs):
        if IS_FAILING and trainer.state.global_step == 2:
            torch.empty(2**50)

    trainer.model.register_forward_pre_hook(allocate)
    trainer.train()


FAILURES = {
    "callback": fail_in_callback,
    "before": fail_before_training,
    "thread": fail_with_a_thread,
    "memory": fail_out_of_memory,
    "exit": leave_with_a_thread,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        FAILURES[sys.argv[2]](sys.argv[1])
    except Exception:
        if IS_FAILING:
            print("time of failure", time.time(), file=sys.stderr)
        raise
