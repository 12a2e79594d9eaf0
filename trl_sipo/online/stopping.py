# SPDX-License-Identifier: Apache-2.0
"""SIGTERM between training runs. All that is written is whole or not there, so that a round can be left anywhere."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from trl_sipo.errors import RoundsPreempted


@dataclass(frozen=True)
class _Leave:
    """A handler of signals that ends the run."""

    folder: str

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise RoundsPreempted(self.folder)


@contextmanager
def leaving_on_sigterm(folder: str) -> Iterator[None]:
    """Raise [`RoundsPreempted`] when SIGTERM comes, in the main thread, unless the program handles it by itself."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _Leave(folder))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def trainer_takes_sigterm() -> Iterator[None]:
    """Within, SIGTERM is the trainer's, which finishes its step and saves."""
    handler = signal.getsignal(signal.SIGTERM)
    if not isinstance(handler, _Leave):
        yield
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
