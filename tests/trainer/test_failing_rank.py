# SPDX-License-Identifier: Apache-2.0
"""When one process fails, all end within seconds, and its error is what is read last."""

import re
import time
from pathlib import Path

import pytest

from tests.trainer.processes import torchrun

SCRIPT = Path(__file__).with_name("failing_run.py")
# What fails in the second process, and its error.
FAILURES = {
    "thread": "RuntimeError: the callback failed",
    "callback": "RuntimeError: the callback failed",
    "before": "DatasetError: ",
    "memory": "RuntimeError: .*memory",
}
IN_THE_DEFAULT_SUITE = "thread"  # the hardest of them: Python alone would wait for it for ten minutes


@pytest.mark.parametrize(
    "failure",
    [pytest.param(name, marks=[] if name == IN_THE_DEFAULT_SUITE else pytest.mark.slow) for name in FAILURES],
)
def test_one_failing_process_ends_all(failure, tmp_path):
    done = torchrun(SCRIPT, tmp_path, failure, timeout=200)
    ended = time.time()
    assert done.returncode != 0
    assert re.search(f"Process 1 of 2 failed: {FAILURES[failure]}", done.stderr), done.stderr[-5000:]
    failed = float(re.search(r"time of failure ([\d.]+)", done.stderr)[1])
    assert ended - failed < 60, "the others waited"
    # torchrun ends with a summary, which names the error as the cause, and not what the others saw of it.
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in summary and re.search(FAILURES[failure].split(": ")[0], summary)


@pytest.mark.slow
def test_one_process_that_leaves_ends_all(tmp_path):
    """With the status that it chose, whatever threads it has."""
    done = torchrun(SCRIPT, tmp_path, "exit", timeout=200)
    ended = time.time()
    assert done.returncode != 0
    left = float(re.search(r"time of failure ([\d.]+)", done.stderr)[1])
    assert ended - left < 60, "the others waited"
    assert re.search(r"rank      : 1 .*\n *exitcode  : 7 ", done.stderr), done.stderr[-5000:]
