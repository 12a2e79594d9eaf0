# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped at random moments ends as one that was left alone: weights, optimiser, log and order."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer import killed_run
from tests.trainer.children import end, fork, wait, wait_for
from tests.trainer.killed_run import CASES, MAX_STEPS, orders
from tests.trainer.resuming import differences
from trl_sipo.errors import Preempted

ROOT = Path(__file__).resolve().parents[2]
# -SIGINT and -SIGTERM: they came before training or when it had ended.
STOPPED = (-signal.SIGKILL, -signal.SIGINT, 130, Preempted.STATUS, -signal.SIGTERM)


def _fork(folder: Path, case: str, kill_after: int) -> int:
    """A child of this process."""
    return fork(lambda: killed_run.train(folder, case, kill_after), folder / "output.txt")


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


def _run_once(start, folder: Path, case: str, chance: random.Random, signals: tuple[int, ...] = ()) -> int:
    """Go on with a run; returns its exit code.

    Args:
        signals: One of them stops it while it trains, or it is killed while it saves; without any it is left alone.
    """
    ready, output = folder / "ready", folder / "output.txt"
    ready.unlink(missing_ok=True)
    while_saving = bool(signals) and chance.random() < 0.5
    child = start(folder, case, chance.randint(1, 60) if while_saving else 0)
    if signals and not while_saving:
        code = wait_for(ready, child)
        if code is None:
            code = wait(child, chance.uniform(0.0, 1.0))
        if code is not None:
            return code
        os.kill(child, chance.choice(signals))
    return end(child, output)


def _alone(folder: Path, case: str) -> tuple[dict, dict]:
    """The end and the order of a run that nobody disturbs."""
    folder.mkdir()
    code = _run_once(_fork, folder, case, random.Random())
    assert code == 0, (folder / "output.txt").read_text()[-3000:]
    return torch.load(folder / "end.pt", weights_only=False), orders(folder)


def _stopped(start, folder: Path, case: str, chance: random.Random, signals, num_stops: int, expected) -> Counter[str]:
    """Stop a run up to `num_stops` times, let it end, and compare; returns what happened how often."""
    folder.mkdir()
    expected_end, order = expected
    counts: Counter[str] = Counter()
    stops, code, unfinished = 0, None, set()
    while code != 0:
        code = _run_once(start, folder, case, chance, signals if stops < num_stops else ())
        assert code in (0, *STOPPED), (code, (folder / "output.txt").read_text()[-3000:])
        if code != 0:
            stops += 1
            counts[f"status {code}"] += 1
            before, unfinished = unfinished, {path.name for path in (folder / "run").glob("_saving-*")}
            counts["while saving"] += bool(unfinished - before)
    counts["stops"] = stops
    found = orders(folder)
    assert found.keys() == order.keys() == set(range(1, MAX_STEPS + 1))
    assert all(batches == order[step][0] for step, times in found.items() for batches in times)
    assert differences(expected_end, torch.load(folder / "end.pt", weights_only=False)) == []
    kept = {path.name for path in (folder / "run").glob("*checkpoint-*")}
    assert len(kept) == 2 and f"checkpoint-{MAX_STEPS}" in kept and not any(name.startswith("_") for name in kept)
    counts["steps done again"] = sum(map(len, found.values())) - MAX_STEPS
    return counts


@pytest.fixture
def folder(tmp_path):
    """Where the runs have their folders, beside their model."""
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    return tmp_path


def test_a_run_that_is_stopped_ends_as_one_that_was_not(folder):
    expected = _alone(folder / "alone", "lora")
    counts = _stopped(_fork, folder / "stopped", "lora", random.Random(1), (signal.SIGINT,), 3, expected)
    assert counts["status -9"], counts  # Python may lose a Ctrl-C that comes while it tidies up


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_soak(case, folder):
    """Processes of their own, stopped eleven times and more for each kind of run."""
    chance = random.Random(case)
    expected = _alone(folder / "alone", case)
    signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    total: Counter[str] = Counter()
    while total["stops"] < 11:
        total += _stopped(_start, folder / f"round-{total['rounds']}", case, chance, signals, 6, expected)
        total["rounds"] += 1
    print(f"{case}: {dict(total)}")
