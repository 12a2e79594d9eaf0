# SPDX-License-Identifier: Apache-2.0
"""Work that several processes share, of which an error on one must not leave the others waiting for it."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

Result = TypeVar("Result")


class OtherProcessError(RuntimeError):
    """Another process could not do its part."""


def together(action: Callable[[], Result], *, communicates: bool = False) -> Result:
    """Run `action` on every process; where it fails on one, raise on all of them. All processes must call it.

    Args:
        communicates: Whether `action` itself waits for other processes. One that fails then raises without telling
            them, since they would not hear it: its end is what the launcher ends the others by.

    Raises:
        OtherProcessError: It failed elsewhere. The process on which it failed raises its own error.
    """
    state = PartialState()
    if state.num_processes == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as caught:  # raised below, when the others know
        if communicates:
            raise
        error = caught
    failures = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    for process, failure in enumerate(failures):
        if failure is not None:
            raise OtherProcessError(f"process {process} failed: {failure}")
    return result


def from_main(action: Callable[[], Result]) -> Result:
    """What `action` gives, or raises, on the main process, on every process."""
    state = PartialState()
    if state.num_processes == 1:
        return action()
    answer: list = [None, None]
    if state.is_main_process:
        try:
            answer[0] = action()
        except Exception as error:  # raised below, on all processes
            answer[1] = error
    result, error = broadcast_object_list(answer)
    if error is not None:
        raise error
    return result
