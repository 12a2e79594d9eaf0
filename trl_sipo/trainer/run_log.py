# SPDX-License-Identifier: Apache-2.0
"""The files that a run writes down as it goes on: JSON Lines, one object per line, each on its way when it is written.

    run_log/starts.jsonl     one line per start: settings, environment, command
    run_log/metrics.jsonl    one line per row of the log
    run_log/levels.jsonl     by noise level: one line per training log and per evaluation

A line is whole or not there. A run that goes on from a checkpoint drops what was written after it, so that the files
end up as those of a run that was never stopped, but for times. Files alone: no torch.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trl_sipo.trainer import json_checks as checks

logger = logging.getLogger(__name__)

RUN_LOG_FOLDER = "run_log"
FORMAT = 1
STARTS, METRICS, LEVELS = "starts.jsonl", "metrics.jsonl", "levels.jsonl"
_LONGEST_LINE = 2**24  # bytes: a longer one is none of ours

# What a checkpoint remembers: whose log it is, and how long the files were.
MARK = checks.record({"run": checks.text(), "sizes": checks.table(checks.count())})


class RunLog:
    """The log of one run in its output folder, open for further lines.

    Use [`begin`] or [`resume`] to get one.

    Another process that starts in the same output folder takes the files over; this log then ends, with a warning.

    Args:
        folder: `run_log` of the run.
        start: What the line of `starts.jsonl` says, which is written now.
        run: What tells the run from others: the time of its first start; `None`: this is the first.

    Raises:
        OSError: The line cannot be written.
    """

    def __init__(self, folder: Path, start: Mapping[str, Any], run: str | None = None):
        time, starts = _now(), folder / STARTS
        self.folder, self.run = folder, run or time
        self._size_before = _size(starts)
        append_line(starts, {"format": FORMAT, "time": time, **start})
        self._own_start = self._last_start()
        self._has_warned = self._is_over = False

    @classmethod
    def begin(cls, output_dir: Path, start: Mapping[str, Any]) -> "RunLog":
        """Begin the log of a new run; that of an earlier one is moved aside, to `run_log-1` and so on.

        Args:
            start: The first line of `starts.jsonl`, but for its format and time.

        Raises:
            OSError: It cannot be written.
        """
        folder = output_dir / RUN_LOG_FOLDER
        set_aside(folder)
        folder.mkdir(parents=True)
        return cls(folder, start)

    @classmethod
    def resume(
        cls, output_dir: Path, start: Mapping[str, Any], *, step: int, mark: Mapping[str, Any] | None
    ) -> "RunLog":
        """Go on with the log of a run, from the state that it had at a checkpoint.

        Args:
            start: The line of `starts.jsonl`, but for its format and time.
            step: Of the checkpoint; without a mark, lines of later steps are dropped.
            mark: What [`mark`] gave at the checkpoint, if it is known. Where the folder holds the log of another run,
                that is moved aside, and the run's own is put back in its place if it is there.

        Raises:
            OSError: It cannot be read or written.
        """
        folder = output_dir / RUN_LOG_FOLDER
        if mark is not None and _run_of(folder) != mark["run"]:
            _put_back(folder, mark["run"])
        run = _run_of(folder)
        if run is None:
            return cls.begin(output_dir, start)
        sizes = {} if mark is None else mark["sizes"]
        for name in (METRICS, LEVELS):
            _cut(folder / name, sizes.get(name), step)
        _cut_torn_line(folder / STARTS)
        return cls(folder, start, run)

    def mark(self) -> dict[str, Any]:
        """What [`resume`] needs to go on from here; of values that JSON can hold."""
        sizes = {} if self._is_over else {name: _size(self.folder / name) for name in (METRICS, LEVELS)}
        return {"run": self.run, "sizes": sizes}

    def write(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to a file. Where that fails, say so the first time: training is worth more than its log."""
        if self._is_over:
            return
        try:
            if self._last_start() != self._own_start:
                self._end()
                return
            append_line(self.folder / name, line)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "The log of the run has gaps: %s cannot be written (%s). Training goes on, and every line is "
                    "tried anew. Make room on the disk, or mend what else is the matter with it.",
                    self.folder / name,
                    error,
                )

    def _last_start(self) -> bytes:
        """All that follows the starts before this one: its own line, unless somebody has started since."""
        with open(self.folder / STARTS, "rb") as file:
            file.seek(self._size_before)
            return file.read()

    def _end(self) -> None:
        self._is_over = True
        logger.warning(
            "The log of the run ends here: another run has begun in the same output folder, and %s is its own now. "
            "Training goes on. Give every run an `output_dir` of its own, or their checkpoints overwrite one another.",
            self.folder,
        )


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append an object to a JSON Lines file, whole or not at all.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    data = (json.dumps(plain(line), allow_nan=False) + "\n").encode("ascii")
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):  # of a device that cannot be shortened; the first error says more
                file.truncate(end)
            raise


def plain(value: Any) -> Any:
    """A value as JSON has it. NaN and infinities, which it has no numbers for, are the texts that stand for them."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    number = getattr(value, "item", None)  # of a tensor
    return plain(number()) if callable(number) and getattr(value, "ndim", 1) == 0 else str(value)


def set_aside(folder: Path) -> None:
    """Rename a folder of an earlier run, if it is there, to the first free name: `run_log-1`, `run_log-2` and so on.

    Raises:
        OSError: It cannot be renamed.
    """
    if not folder.exists():
        return
    number = 1
    while (other := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(other)
    logger.warning("%s, of another run, was moved to %s, so that the two are not mixed.", folder, other.name)


def _put_back(folder: Path, run: str) -> None:
    """Give the name to the log of this run, if it was moved aside, and move that of another one aside."""
    own = [other for other in sorted(folder.parent.glob(f"{folder.name}-*")) if _run_of(other) == run]
    set_aside(folder)
    if own:
        own[0].rename(folder)


def _run_of(folder: Path) -> str | None:
    """Whose log a folder holds: the time in its first line; `None`: nobody's, or one that must not be written to."""
    if any((folder / name).is_symlink() for name in (STARTS, METRICS, LEVELS)):
        return None  # to a file of somebody else, of a cache of the hub for one, which would be cut short
    try:
        with open(folder / STARTS, "rb") as file:
            time = json.loads(file.readline(_LONGEST_LINE))["time"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return time if isinstance(time, str) else None


def _cut(path: Path, size: int | None, step: int) -> None:
    """Shorten a file to the size that it had at a checkpoint; where that is not known, to the lines up to a step.

    It is cut in place: what is dropped is always the end.
    """
    if not path.is_file():
        return
    if size is None or not _ends_line(path, size):
        size = _size_up_to(path, step)
    if size < _size(path):
        with open(path, "r+b") as file:
            file.truncate(size)


def _size_up_to(path: Path, step: int) -> int:
    """Bytes of the lines before the first of a later step, without a last one that is torn."""
    size = 0
    with open(path, "rb") as file:
        for line in _lines(file.readline):
            if not line.endswith(b"\n") or _step_of(line) > step:
                break
            size += len(line)
    return size


def _cut_torn_line(path: Path) -> None:
    _cut(path, None, checks.LARGEST_COUNT)


def _lines(read: Callable[[int], bytes]) -> Iterable[bytes]:
    return iter(lambda: read(_LONGEST_LINE), b"")


def _step_of(line: bytes) -> float:
    """The step that a line says; of one that cannot be read, none: it stays where it is."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1
    return step if isinstance(step, int | float) else -1


def _ends_line(path: Path, size: int) -> bool:
    """Whether a file is at least so long, and a line ends there."""
    if size == 0 or size > _size(path):
        return size == 0
    with open(path, "rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _now() -> str:
    return datetime.now(UTC).isoformat()
