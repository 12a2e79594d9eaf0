# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at random moments ends as one that was left alone: weights, optimiser, log and order."""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer import killed_run
from tests.trainer.killed_run import CASES, MAX_STEPS, orders
from tests.trainer.resuming import differences

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds until a run that does nothing counts as hanging


def _fork(folder: Path, case: str, kill_after: int) -> int:
    """A child of this process, which has everything imported already; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(folder / "output.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            killed_run.train(folder, case, kill_after)
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _start(folder: Path, case: str, kill_after: int) -> int:
    """A process of its own, which imports everything anew; returns its id."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    script = str(Path(killed_run.__file__))
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, script, str(folder), case, str(kill_after)],
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
        ).pid


def _wait(child: int, until: float) -> int | None:
    """The exit code of a child, negative for a signal; `None` when it still runs at this time."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def _run_once(start, folder: Path, case: str, chance: random.Random, *, kill: bool) -> int:
    """Go on with a run, and kill it while it trains or while it saves; returns its exit code."""
    (folder / "ready").unlink(missing_ok=True)
    while_saving = kill and chance.random() < 0.5
    child = start(folder, case, chance.randint(1, 60) if while_saving else 0)
    deadline = time.monotonic() + PATIENCE
    try:
        if kill and not while_saving:
            while not (folder / "ready").exists() and time.monotonic() < deadline:
                code = _wait(child, time.monotonic() + 0.002)
                if code is not None:
                    return code
            code = _wait(child, time.monotonic() + chance.uniform(0.0, 1.5))
            if code is not None:
                return code
            os.kill(child, signal.SIGKILL)
        code = _wait(child, deadline)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError(f"hangs: {(folder / 'output.txt').read_text()[-3000:]}")
    return code


def _alone(folder: Path, case: str) -> tuple[dict, dict]:
    """The end and the order of a run that nobody disturbs."""
    folder.mkdir()
    assert _run_once(_fork, folder, case, random.Random(), kill=False) == 0, (folder / "output.txt").read_text()[
        -3000:
    ]
    return torch.load(folder / "end.pt", weights_only=False), orders(folder)


def _killed(start, folder: Path, case: str, chance: random.Random, num_kills: int, expected) -> dict[str, int]:
    """Kill a run up to `num_kills` times, let it end, and compare; returns what happened how often."""
    folder.mkdir()
    end, order = expected
    counts = {"kills": 0, "while_saving": 0, "steps_repeated": 0}
    code = -signal.SIGKILL
    while code != 0:
        code = _run_once(start, folder, case, chance, kill=counts["kills"] < num_kills)
        assert code in (0, -signal.SIGKILL), (folder / "output.txt").read_text()[-3000:]
        if code != 0:
            counts["kills"] += 1
            counts["while_saving"] += any((folder / "run").glob("_saving-*"))
    found = orders(folder)
    assert found.keys() == order.keys() == set(range(1, MAX_STEPS + 1))
    assert all(batches == order[step][0] for step, times in found.items() for batches in times)
    assert differences(end, torch.load(folder / "end.pt", weights_only=False)) == []
    kept = {path.name for path in (folder / "run").glob("*checkpoint-*")}
    assert kept == {f"checkpoint-{MAX_STEPS - 2}", f"checkpoint-{MAX_STEPS}"}
    counts["steps_repeated"] = sum(map(len, found.values())) - MAX_STEPS
    return counts


@pytest.fixture
def folder(tmp_path):
    """Where the runs have their folders, beside their model."""
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    return tmp_path


def test_a_run_that_is_killed_ends_as_one_that_was_not(folder):
    expected = _alone(folder / "alone", "lora")
    counts = _killed(_fork, folder / "killed", "lora", random.Random(4), 3, expected)
    assert counts["kills"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_soak(case, folder):
    """Processes of their own, killed eleven times and more for each kind of run."""
    chance = random.Random(case)
    expected = _alone(folder / "alone", case)
    total = {"kills": 0, "while_saving": 0, "steps_repeated": 0}
    rounds = 0
    while total["kills"] < 11:
        counts = _killed(_start, folder / f"round-{rounds}", case, chance, 6, expected)
        total = {name: total[name] + counts[name] for name in total}
        rounds += 1
    print(f"{case}: {rounds} rounds, {total}")
