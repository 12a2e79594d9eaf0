# SPDX-License-Identifier: Apache-2.0
"""A scorer as a process: one JSON message per line on its standard input and output, media as files."""

import contextlib
import json
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sipo.errors import ConfigurationError, RewardError, StorageError
from trl_sipo.rewards.base import Media
from trl_sipo.rewards.outside.media_encoding import as_file
from trl_sipo.rewards.outside.protocol import MAX_ANSWER_BYTES, Unanswered, parse_answer

PREFIX = "process:"
_GRACE = 5.0  # seconds that a process has to end after its input did, and again after SIGTERM
_TAIL_LINES, _TAIL_BYTES = 20, 4000
_READ_AT_ONCE = 2**16


class ProcessTransport:
    """Carries messages to a command and back. It is started for the first message, and again after it ended.

    The command is no line of a shell: nothing in it is expanded, no pipe is made. It ends when this object is closed
    or forgotten, when the program ends, and after a message without a proper answer; and, since its standard input
    ends, when the program is killed.

    Args:
        command: The program and its arguments, quoted as in a shell.
        cwd: Folder that it runs in.
        environment: Variables that it gets beside those of this process.
        log: File that its stderr is appended to; else a temporary one.
        start_timeout: Seconds for its first answer, in which it may load its model.

    Raises:
        ConfigurationError: The command is empty, or its quotes do not match.
    """

    def __init__(
        self,
        command: str,
        *,
        cwd: str | None = None,
        environment: Mapping[str, str] | None = None,
        log: str | Path | None = None,
        start_timeout: float = 600.0,
    ):
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise ConfigurationError(f"The command of the scorer {command!r} cannot be read: {error}.") from error
        if not self._arguments:
            raise ConfigurationError("The scorer 'process:' has no command: write 'process:PROGRAM ARGUMENT ...'.")
        self.name = PREFIX + command
        self.start_timeout = start_timeout
        self._options = {"cwd": cwd, "env": {**os.environ, **(environment or {})}}
        self._log = None if log is None else Path(log).expanduser()
        self._running: _Running | None = None

    def samples(self, media: Sequence[Media], prompts: Sequence[str], frame_rate: float) -> list[dict[str, Any]]:
        """The samples of a message; their files are there until it is answered.

        Raises:
            StorageError: A file cannot be written.
        """
        folder = self._process().folder
        return [
            as_file(medium, prompt, folder / f"{number:05d}", frame_rate)
            for number, (medium, prompt) in enumerate(zip(media, prompts, strict=True))
        ]

    def exchange(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            Unanswered: The process cannot be reached, ended, or took too long.
            RewardError: It answered what is no answer.
        """
        running = self._process()
        seconds = timeout if running.has_answered else max(timeout, self.start_timeout)
        try:
            line = running.exchange(json.dumps(request).encode() + b"\n", seconds)
            answer = parse_answer(line, request)
        except RewardError as error:
            said = running.end(at_once=True)
            self._running = None
            raise type(error)(f"{error}{f'. It said last: {said}' if said else ''}") from error
        running.has_answered = True
        for sample in request.get("samples", ()):
            Path(sample["path"]).unlink(missing_ok=True)
        return answer

    def close(self) -> None:
        """End the process, if it runs, and remove its files."""
        if self._running is not None:
            self._running.end()
            self._running = None

    def _process(self) -> "_Running":
        # One that this process inherited by a fork is its parent's.
        if self._running is None or self._running.owner != os.getpid():
            self._running = _Running(self._arguments, self._log, self._options)
        return self._running


class _Running:
    """One start of a command, and the folder for the files that it reads.

    Raises:
        ConfigurationError: There is no such program, or folder to run in.
        StorageError: Its folder or its log cannot be written.
    """

    def __init__(self, arguments: Sequence[str], log: Path | None, options: Mapping[str, Any]):
        self.owner = os.getpid()
        self.has_answered = False
        self.folder = _temporary_folder()
        self._log = log or self.folder / "stderr.log"
        self._received = bytearray()
        try:
            with self._open_log() as stderr:
                self._started = stderr.tell()
                self._process = subprocess.Popen(
                    list(arguments),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    bufsize=0,
                    start_new_session=True,  # what it starts itself ends with it, and Ctrl-C is ours to handle
                    **options,
                )
        except BaseException as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise ConfigurationError(f"The scorer {arguments[0]!r} cannot be started: {error}.") from error
            raise
        os.set_blocking(self._process.stdin.fileno(), False)
        self._finalizer = weakref.finalize(self, _end, self._process, self.folder, self.owner)

    def _open_log(self) -> Any:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            return self._log.open("ab")
        except OSError as error:
            raise StorageError(f"The log of the scorer, {str(self._log)!r}, cannot be written: {error}.") from error

    def exchange(self, line: bytes, seconds: float) -> bytes:
        """Write a line and read one, in this time.

        Raises:
            Unanswered: It ended, or took longer.
            RewardError: The line is too long.
        """
        end, unsent, is_whole = time.monotonic() + seconds, memoryview(line), b"\n" in self._received
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            selector.register(self._process.stdin, selectors.EVENT_WRITE)
            while not is_whole:
                left = end - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    raise Unanswered(f"it did not answer within {seconds:g} s")
                for key, _ in ready:
                    if key.fileobj is self._process.stdout:
                        is_whole = b"\n" in self._receive()
                    else:
                        unsent = unsent[self._send(unsent) :]
                        if not unsent:
                            selector.unregister(self._process.stdin)
        answer, _, self._received = self._received.partition(b"\n")
        return bytes(answer)

    def _send(self, data: memoryview) -> int:
        try:
            return os.write(self._process.stdin.fileno(), data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise self._gone() from None

    def _receive(self) -> bytes:
        data = os.read(self._process.stdout.fileno(), _READ_AT_ONCE)
        if not data:
            raise self._gone()
        self._received += data
        if len(self._received) > MAX_ANSWER_BYTES:
            raise RewardError(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
        return data

    def _gone(self) -> Unanswered:
        how = _how_it_ended(self._process, _GRACE)
        return Unanswered("it closed its output, and runs on" if how is None else f"it ended {how}")

    def end(self, at_once: bool = False) -> str:
        """End it and all that it started, and remove its files.

        Args:
            at_once: It is not given the time to notice that its input has ended.

        Returns:
            The last lines of its stderr.
        """
        if self.owner != os.getpid():
            return ""
        self._finalizer.detach()
        _end_process(self._process, at_once)
        said = self._tail()
        shutil.rmtree(self.folder, ignore_errors=True)
        return said

    def _tail(self) -> str:
        try:
            with self._log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _TAIL_BYTES, self._started))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-_TAIL_LINES:]).strip()


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="trl-sipo-scorer-"))
    except OSError as error:
        raise StorageError(f"No folder for the files of a scorer can be made: {error}.") from error


def _end(process: subprocess.Popen, folder: Path, owner: int) -> None:
    """What is done when nobody has closed the transport."""
    if os.getpid() == owner:
        _end_process(process, at_once=False)
        shutil.rmtree(folder, ignore_errors=True)


def _end_process(process: subprocess.Popen, at_once: bool) -> None:
    """End a process by the end of its input, by SIGTERM, by SIGKILL; and then all that it started."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    if at_once or _how_it_ended(process, _GRACE) is None:
        _signal_group(process, signal.SIGTERM)
        _how_it_ended(process, _GRACE)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    """To a process and all that it started. The number of a group is nobody else's while there is one of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # there is none; macOS says the latter of the dead
        os.killpg(process.pid, number)


def _how_it_ended(process: subprocess.Popen, seconds: float) -> str | None:
    """How a process ended within this time; None: it runs on."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
