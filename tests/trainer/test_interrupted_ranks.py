# SPDX-License-Identifier: Apache-2.0
"""Two processes: stopped by one signal they stop together, and go on to the bit; none waits for one that failed."""

import pytest
import torch

from tests.trainer.interrupted_ranks import fill_disk, preempt, resume, train
from tests.trainer.processes import run_ranks
from tests.trainer.resuming import differences
from trl_sipo.trainer.checkpoint_files import last_complete_checkpoint

pytestmark = pytest.mark.slow


# Each is read one step later, by both.
@pytest.mark.parametrize(("steps", "left_after"), [({1: 2}, 3), ({0: 4, 1: 3}, 4), ({0: 1}, 2)])
def test_two_processes_stop_together_and_go_on_to_the_bit(steps, left_after, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(train, whole, directory=whole)
    run_ranks(preempt, run, steps, directory=run)
    assert [(run / f"left-{rank}").read_text() for rank in (0, 1)] == [f"75 {left_after}"] * 2
    assert last_complete_checkpoint(run) == run / f"checkpoint-{left_after}"
    run_ranks(resume, run, directory=run)
    for rank in (0, 1):
        expected, end = (torch.load(folder / f"end-{rank}.pt", weights_only=False) for folder in (whole, run))
        assert differences(expected, end) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_is_full_for_one_process_ends_all(failing, tmp_path):
    run_ranks(fill_disk, tmp_path, failing, directory=tmp_path, timeout=120)
    own, other = ((tmp_path / f"error-of-{rank}").read_text() for rank in (failing, 1 - failing))
    assert "OSError: [Errno 28] No space left on device" in own
    assert f"process {failing} failed: OSError: [Errno 28]" in other
    assert not list(tmp_path.glob("*checkpoint-*"))
    assert abs(float(own.split()[0]) - float(other.split()[0])) < 5.0
