# SPDX-License-Identifier: Apache-2.0
"""Children of the test process, which have everything imported already, and how they end."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(action: Callable[[], None], output: Path, *, own_group: bool = False) -> int:
    """Start `action` in a child, whose output goes to a file; returns its id, which is also that of its group."""
    child = os.fork()
    if child:
        return child
    status = 1
    with open(output, "a", buffering=1) as file:
        try:
            if own_group:
                os.setpgid(0, 0)
            sys.stdout = sys.stderr = file
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            action()
            status = 0
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """The exit code of a child, negative for a signal; `None` when it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def end(child: int, output: Path, seconds: float = 300.0) -> int:
    """The exit code of a child that must end by itself; else it is killed, and the test fails."""
    code = None
    try:
        code = wait(child, seconds)
    finally:
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert code is not None, f"hangs: {output.read_text()[-3000:]}"
    return code


def wait_for(file: Path, child: int, seconds: float = 300.0) -> int | None:
    """Wait until a file is there; the exit code of the child when it has ended before."""
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        if (code := wait(child, 0.003)) is not None:
            return code
    return None
