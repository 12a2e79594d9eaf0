# SPDX-License-Identifier: Apache-2.0
"""Two processes with four pairs each train what one process with eight does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.runs import largest_difference

ROOT = Path(__file__).resolve().parents[2]


def _run(processes, output, *arguments, **environment):
    script = str(Path(__file__).with_name("distributed_run.py"))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    settings = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, script, str(output), *map(str, arguments)],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(output / "result.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("sipo", "new_lora"), ("dpo", "trained_lora"), ("dpo_cm", "full")])
def test_two_processes_are_one(method, kind, tmp_path):
    one = _run(1, tmp_path / "one", method, kind, 8)
    two = _run(2, tmp_path / "two", method, kind, 4)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    # To the rounding of an error in batches of four and eight, times a beta of up to 5000.
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-3) and two["masked"] == one["masked"]
    # Each of the seven held-out pairs counts once, although they do not divide among the processes.
    for key, value in one["metrics"].items():
        if "rewards" in key or "loss" in key or "sipo" in key:
            assert two["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    for name in ("samples/step-000002.png", "training_args.bin"):
        assert (tmp_path / "two" / name).is_file()


@pytest.mark.slow
def test_two_compiled_processes_are_one_that_is_not(tmp_path):
    """Blocks are compiled inside the wrapper that exchanges the gradients."""
    one = _run(1, tmp_path / "one", "sipo", "new_lora", 8)
    two = _run(2, tmp_path / "two", "sipo", "new_lora", 4, ACCELERATE_DYNAMO_BACKEND="aot_eager")
    assert two["processes"] == 2
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
