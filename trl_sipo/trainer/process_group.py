# SPDX-License-Identifier: Apache-2.0
"""Leaving a group of processes: at the end of a run, and when one of them fails."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from accelerate import Accelerator
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

_GLOO_THREAD = "pt_gloo_runloop"
_PATIENCE = 10.0  # seconds; a thread needs less than one, on a machine that does ten times what it can
# Words of the errors by which a collective says that another process has gone, and the seconds by which such an error
# is reported later, so that what is recorded first, and shown as the cause, is the error of the process that went.
_GONE = ("gloo", "nccl", "closed by peer", "remote worker", "reset by peer")
_AFTERMATH = 3.0
# Seconds in which a process that leaves by a SystemExit may end as Python ends it.
_FAREWELL = 10.0

ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], object]
"""As `sys.excepthook`."""


def release_process_group(accelerator: Accelerator) -> None:
    """Leave the group of processes, and wait until gloo's threads hold nothing of Python's any more.

    A thread of gloo lets go of the tensors of its last work some time after that work is done. If the interpreter ends
    first, that needs an interpreter which is gone, and the process aborts with "terminate called without an active
    exception" (https://github.com/pytorch/pytorch/issues/190489). Destroying the group does not end the threads.
    """
    accelerator.end_training()
    calm_looks, end = 0, time.monotonic() + _PATIENCE
    while calm_looks < 2 and time.monotonic() < end:
        time.sleep(0.01)  # lets the threads have the interpreter
        calm_looks = 0 if _gloo_is_busy() else calm_looks + 1


def _gloo_is_busy() -> bool:
    """Whether a thread of gloo runs or waits for a processor. Where the system does not tell: no."""
    for file in Path("/proc/self/task").glob("*/stat"):
        try:
            before, _, after = file.read_text().rpartition(")")
        except OSError:  # a thread that has ended since
            continue
        if before.endswith(_GLOO_THREAD) and after.split()[0] != "S":
            return True
    return False


def end_at_once_on_errors(processes: int) -> None:
    """Let an error that nobody handles end this process at once, so that the launcher ends the others.

    Python would first wait for threads, run what is registered for the end of a program and tear objects down. Each of
    these may wait for another process, which in turn waits in a collective for this one.

    Args:
        processes: How many the run has; where it is one, nothing is changed.
    """
    if processes > 1 and not isinstance(sys.excepthook, _ReportAndEnd):
        sys.excepthook = _ReportAndEnd(sys.excepthook)


class _ReportAndEnd:
    """The hook for errors that nobody handles: the one that was there reports, and the process ends.

    Args:
        report: Python's own hook, or the user's.
    """

    def __init__(self, report: ExceptHook):
        self.report = report

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            self.report(kind, error, trace)
        except BaseException:  # of the user's hook, which must not keep the process alive
            traceback.print_exc()
        _end_after(kind, error)


def _end_after(kind: type[BaseException], error: BaseException) -> None:
    if not isinstance(error, Exception):  # Ctrl-C, which the launcher sends to every process
        return
    if isinstance(error, DistError) or any(word in str(error).lower() for word in _GONE):
        time.sleep(_AFTERMATH)
    try:
        raise error  # what is recorded is the error that is being handled
    except Exception:
        get_error_handler().record_exception(error)  # for the summary with which torchrun ends
    rank, processes = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
    print(f"Process {rank} of {processes} failed: {kind.__name__}: {error}", file=sys.stderr)
    end_process(1)


def end_in_time(leaving: SystemExit, processes: int) -> None:
    """Let a SystemExit end this process within seconds, so that the launcher ends the others.

    No hook of Python's is told of it. Whoever handles it may go on; only when the main thread has ended, and what
    Python waits for then (threads, what is registered for the end of a program) takes too long, the process ends
    without it.

    Args:
        leaving: One of this process alone, as by `sys.exit` in a callback.
        processes: How many the run has; where it is one, and for a status of 0, nothing is done.
    """
    status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if processes == 1 or status == 0:
        return

    def end() -> None:
        threading.main_thread().join()
        time.sleep(_FAREWELL)
        end_process(status)

    threading.Thread(target=end, name="end_in_time", daemon=True).start()


def end_process(status: int) -> NoReturn:
    """End the process with an exit status; as one of several, without the end of the program that Python prepares."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
