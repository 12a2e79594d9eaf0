# SPDX-License-Identifier: Apache-2.0
"""A run that is killed again and again, and what it left behind: `killed_run.py <folder> <case> <kill after fsyncs>`.

Every call goes on from the last complete checkpoint. Beside the end of the run, it writes the pairs of every step.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.trainer.resuming import end_of
from tests.trainer.runs import DPO, SIPO, make_trainer, preference_pairs

MAX_STEPS = 24
# The checkpoints fall between the logs; 10 pairs are 5 batches, so that a run sees several epochs.
COMMON = {
    "max_steps": MAX_STEPS, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": 2, "logging_steps": 3, "learning_rate": 1e-3,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "lora": {"mask_redraws": 1},
    "full": {"is_lora": False, "gradient_accumulation_steps": 2, "sync_ref_model": True, "ref_model_sync_steps": 5},
    "stream": {"dataloader_num_workers": 1, "lr_scheduler_type": "linear"},
}


class _Witness(TrainerCallback):
    """Writes which pairs a step had, and tells whoever waits that training has begun."""

    def __init__(self, folder: Path, order: list[list[int]]):
        self.folder, self.order = folder, order

    def on_train_begin(self, args, state, control, **kwargs):
        (self.folder / "ready").touch()

    def on_step_end(self, args, state, control, **kwargs):
        with open(self.folder / "order.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([state.global_step, self.order]) + "\n")
        self.order.clear()


def train(folder: Path, case: str, kill_after: int = 0) -> None:
    """Go on with the run in `folder`, to its end.

    Args:
        case: A key of `CASES`.
        kill_after: Kill this process after so many calls of `os.fsync`, which are those of a checkpoint; 0: never.
    """
    torch.set_num_threads(1)
    options = {**COMMON, **CASES[case]}
    pairs = preference_pairs(10)
    pairs = pairs.to_iterable_dataset().shuffle(seed=1, buffer_size=4) if case == "stream" else pairs
    method = SIPO if case == "lora" else DPO
    trainer = make_trainer(method, folder / "run", model=str(folder.parent / "base"), pairs=pairs, **options)
    order: list[list[int]] = []
    step = trainer._training_loss

    def observed(model: Any, inputs: Any) -> Any:
        order.append(inputs["pair_index"].tolist())
        return step(model, inputs)

    trainer._training_loss = observed
    trainer.add_callback(_Witness(folder, order))
    if kill_after:
        _kill_after(kill_after)
    trainer.train(resume_from_checkpoint="auto")
    torch.save(end_of(trainer), folder / "end.pt")


def _kill_after(calls: int) -> None:
    fsync, left = os.fsync, [calls]

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = counted


def orders(folder: Path) -> dict[int, list[list[list[int]]]]:
    """By step, the batches of every time that it was done."""
    found: dict[int, list[list[list[int]]]] = {}
    for line in (folder / "order.jsonl").read_text(encoding="utf-8").splitlines():
        step, batches = json.loads(line)
        found.setdefault(step, []).append(batches)
    return found


if __name__ == "__main__":
    try:
        train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except KeyboardInterrupt:  # Python would say so by the signal, but for bitsandbytes, with which it says 1
        sys.exit(130)
