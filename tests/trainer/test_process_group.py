# SPDX-License-Identifier: Apache-2.0
"""Processes of a group end with the status that their work has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.processes import free_port, launched
from trl_sipo.trainer import process_group

# Threads of gloo that run when nobody else does: each is interrupted as soon as its work is done, and before it lets
# go of the tensors of it. Without `release_process_group` nearly every such process aborts.
_SLOW_THREADS = """
import os
import torch
from accelerate import Accelerator
from trl_sipo.trainer.process_group import release_process_group

os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(64, 64))
for task in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{task}/comm") as name:
        if name.read().startswith("pt_gloo_runloop"):
            os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
for _ in range(3):
    model(torch.ones(2, 64)).sum().backward()
tensor = torch.ones(10)
torch.distributed.all_reduce(tensor)
release_process_group(accelerator)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are looked at through Linux' /proc")
def test_processes_whose_threads_are_slow_do_not_abort():
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SLOW_THREADS],
            env={**os.environ, **launched(rank, 2, port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_one_process_ends_as_python_ends_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    hook = sys.excepthook
    process_group.end_at_once_on_errors(1)
    assert sys.excepthook is hook
    with pytest.raises(SystemExit, match="2"):
        process_group.end_process(2)


def test_an_error_in_one_of_several_processes_ends_it(monkeypatch, capsys):
    ended = []
    for name, value in launched(1, 2, 29500).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(process_group, "end_process", ended.append)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    process_group.end_at_once_on_errors(2)
    for error in (KeyboardInterrupt(), ValueError("no such pair")):
        sys.excepthook(type(error), error, None)
    assert ended == [1], "Ctrl-C reaches every process, and each ends by itself"
    assert "Process 1 of 2 failed: ValueError: no such pair" in capsys.readouterr().err


def _hooked(monkeypatch, hook):
    """Errors reported by `hook`, the user's own, and what the process ended with."""
    ended = []
    for name, value in launched(1, 2, 29500).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(process_group, "end_process", ended.append)
    monkeypatch.setattr(sys, "excepthook", hook)
    for _ in range(2):  # as two trainers in one program do
        process_group.end_at_once_on_errors(2)
    return ended


def test_the_hook_of_the_user_reports_too(monkeypatch, capsys):
    reported = []
    ended = _hooked(monkeypatch, lambda kind, error, trace: reported.append(error))
    error = ValueError("no such pair")
    sys.excepthook(ValueError, error, None)
    assert reported == [error] and ended == [1]
    said = capsys.readouterr().err
    assert "Process 1 of 2 failed: ValueError: no such pair" in said and said.count("no such pair") == 1


def test_a_hook_that_fails_keeps_no_process_alive(monkeypatch, capsys):
    def hook(kind, error, trace):
        raise KeyError("of the hook")

    ended = _hooked(monkeypatch, hook)
    sys.excepthook(ValueError, ValueError("no such pair"), None)
    assert ended == [1] and "of the hook" in capsys.readouterr().err


_LEAVES = """
import sys, threading, time
from trl_sipo.trainer import process_group

process_group._FAREWELL = 0.1
process_group.end_in_time(SystemExit(0), 2)
process_group.end_in_time(SystemExit(7), 1)
process_group.end_in_time(SystemExit(7), 2)
time.sleep(0.5)
print("goes on", flush=True)
threading.Thread(target=time.sleep, args=(100,)).start()
sys.exit(7)
"""


def test_a_process_that_leaves_does_not_wait_for_its_threads():
    environment = {**os.environ, **launched(1, 2, 29500)}
    done = subprocess.run([sys.executable, "-c", _LEAVES], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 7 and done.stdout == "goes on\n", done.stderr
