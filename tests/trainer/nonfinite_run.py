# SPDX-License-Identifier: Apache-2.0
"""What `test_nonfinite_processes.py` runs in both of two processes; something breaks in the second alone."""

import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch

from tests.trainer.runs import SIPO, logged, make_trainer, preference_pairs
from trl_sipo.errors import NumericalError
from trl_sipo.trainer.reproduction import load_reproduction

BROKEN_STEP = 2


def _trainer(output: str, **options):
    return make_trainer(
        SIPO,
        output,
        pairs=preference_pairs(16),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        **options,
    )


def _break_error(trainer) -> None:
    """The policy's error of the first pair that the second process has in the broken step."""
    pair_errors = trainer.pair_errors

    def broken(*args, **kwargs):
        errors = pair_errors(*args, **kwargs)
        if trainer.state.global_step + 1 != BROKEN_STEP or os.environ["RANK"] != "1":
            return errors
        return dataclasses.replace(errors, chosen=errors.chosen * torch.tensor([float("nan"), 1.0, 1.0, 1.0]))

    trainer.pair_errors = broken


def _break_gradient(trainer) -> None:
    """A gradient of the second process, before it is averaged with the first one's."""
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)

    def broken(gradient):
        is_broken = trainer.state.global_step + 1 == BROKEN_STEP and os.environ["RANK"] == "1"
        return gradient * float("nan") if is_broken else gradient

    parameter.register_hook(broken)


BREAKS = {"policy": _break_error, "gradient": _break_gradient}


def skip(output: str, link: str) -> None:
    """Both leave the step out, and have the same weights at the end."""
    trainer = _trainer(output, on_nonfinite="skip")
    BREAKS[link](trainer)
    trainer.train()
    assert logged(trainer, "sipo/skipped_steps") == [0, 1, 1, 1]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    first, second = trainer.accelerator.gather(weights[None])
    assert torch.equal(first, second) and first.isfinite().all() and first.any()
    trainer.end()


def fail(output: str, link: str) -> None:
    """Both raise the same error at the same step; the tensors are written where they are."""
    trainer = _trainer(output)
    BREAKS[link](trainer)
    with pytest.raises(NumericalError, match=f"Step {BROKEN_STEP}: ") as caught:
        trainer.train()
    if link == "policy":
        assert "for 1 of 8 pairs" in str(caught.value)
    trainer.accelerator.wait_for_everyone()
    names = sorted(path.name for path in Path(output, "_nonfinite").glob("*.json"))
    processes = (1,) if link == "policy" else (0, 1)
    assert names == [f"step-00000{BROKEN_STEP}-process-{process}-part-0.json" for process in processes]
    trainer.end()


def fail_on_a_slow_disk(output: str) -> None:
    """None raises, which lets the launcher end the others, before all have written what broke."""
    trainer = _trainer(output)
    _break_error(trainer)
    if os.environ["RANK"] == "1":
        write = trainer.recorder.reproduce._write

        def slowly(*args):
            time.sleep(1.0)
            write(*args)

        trainer.recorder.reproduce._write = slowly
    with pytest.raises(NumericalError):
        trainer.train()
    load_reproduction(Path(output, "_nonfinite", f"step-00000{BROKEN_STEP}-process-1-part-0.json"))
    trainer.end()
