# SPDX-License-Identifier: Apache-2.0
"""SIGTERM between training runs. All that is written is whole or not there, so that a round can be left anywhere."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trl_sipo.errors import RoundsPreempted


@contextmanager
def leaving_on_sigterm(folder: str) -> Iterator[None]:
    """Raise [`RoundsPreempted`] when SIGTERM comes, in the main thread, unless the program handles it by itself."""

    def leave(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise RoundsPreempted(folder)

    if not _is_free():
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def trainer_takes_sigterm() -> Iterator[None]:
    """Within, SIGTERM is the trainer's, which finishes its step and saves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _is_free() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
