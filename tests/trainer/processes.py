# SPDX-License-Identifier: Apache-2.0
"""Real second processes for tests: forked from a server that has imported everything, or started by torchrun."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_SETTINGS = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
_GRACE = 5.0  # seconds for the others when one process has failed, so that they can say why


def run_ranks(
    function: Callable[..., None], *arguments: Any, directory: Path, processes: int = 2, timeout: float = 240
) -> None:
    """Call a function of a module in every process of a group, as a launcher would, and wait for all of them.

    The first call of a session takes some seconds, in which the server imports; every further one forks from it.

    Args:
        directory: Where what the processes print on an error is kept.
        timeout: Seconds after which the processes are ended.

    Raises:
        AssertionError: A process failed, or did not end in time; with what it said.
    """
    context = fork_server()
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    errors = [directory / f"error-{rank}.txt" for rank in range(processes)]
    ranks = [
        context.Process(target=_rank, args=(rank, processes, port, error, function, arguments), daemon=True)
        for rank, error in enumerate(errors)
    ]
    for rank in ranks:
        rank.start()
    _wait(ranks, timeout)
    said = "\n".join(error.read_text() for error in errors if error.is_file())
    assert all(rank.exitcode == 0 for rank in ranks), f"exit codes {[rank.exitcode for rank in ranks]}\n{said}"


def fork_server() -> Any:
    """The context of processes that are forked from a server which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.runs"])
    path = os.environ.get("PYTHONPATH", "")
    if str(ROOT) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), path]).strip(os.pathsep)
    return context


def _wait(ranks: list[Any], timeout: float) -> None:
    """Until all have ended, or the time is up, or one has failed and the others had their time to notice."""
    end = time.monotonic() + timeout
    while any(rank.exitcode is None for rank in ranks) and time.monotonic() < end:
        if any(rank.exitcode for rank in ranks):
            end = min(end, time.monotonic() + _GRACE)
        time.sleep(0.05)
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
        rank.join()


def _rank(rank: int, processes: int, port: int, error: Path, function: Any, arguments: tuple) -> None:
    """What runs in a process of the group."""
    os.environ.update(launched(rank, processes, port))
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        error.write_text(f"process {rank}:\n{traceback.format_exc()}")
        raise


def torchrun(
    *arguments: Any, processes: int = 2, timeout: float = 300, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script, or `-m` and a module, under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        env={**os.environ, **_SETTINGS, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def launched(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment that a launcher gives to a process, on CPUs."""
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in {**_SETTINGS, **settings, **address}.items()}


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
