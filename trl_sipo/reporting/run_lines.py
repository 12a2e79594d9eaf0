# SPDX-License-Identifier: Apache-2.0
"""Lines of JSON that a running process writes and anyone may have touched: read one by one, whatever is in them."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_sipo.errors import DatasetError

_LONGEST_LINE = 4 << 20  # bytes
_LARGEST_FILE = 64 << 20  # bytes, of what is read as a whole
_WORTH_A_BAR = 64 << 20  # bytes
_LARGEST_STEP = 2**53
_LARGEST, _SMALLEST = 1e100, 1e-100
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def file_inside(folder: Path, name: str) -> Path | None:
    """A regular file below `folder`, or None: not there, a pipe, or reached through a link that leads out."""
    path = folder / name
    if not path.is_file():
        return None
    return path if path.resolve().is_relative_to(folder.resolve()) else None


class JsonLines:
    """The objects in a file of JSON lines.

    A last line without an end is being written and is no fault; other lines that are no JSON objects are counted.

    Args:
        path: Of the file; none: there are no lines.

    Attributes:
        num_broken: Lines that could not be read, so far.

    Raises:
        DatasetError: The file cannot be read; while its lines are gone through.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.num_broken = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path is None:
            return
        try:
            yield from self._objects(self.path)
        except OSError as error:
            raise DatasetError(f"{str(self.path)!r} cannot be read: {error.strerror}.") from error

    def _objects(self, path: Path) -> Iterator[dict[str, Any]]:
        size = path.stat().st_size
        bar = {"total": size, "unit": "B", "unit_scale": True, "desc": path.name}
        with path.open("rb") as file, tqdm(**bar, disable=size < _WORTH_A_BAR, leave=False) as progress:
            for line in iter(lambda: file.readline(_LONGEST_LINE), b""):
                progress.update(len(line))
                if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    self.num_broken += 1
                    _skip_line(file)
                elif (found := _parsed(line)) is not None:
                    yield found
                elif line.endswith(b"\n") and line.strip():
                    self.num_broken += 1


def _skip_line(file: Any) -> None:
    for piece in iter(lambda: file.readline(_LONGEST_LINE), b""):
        if piece.endswith(b"\n"):
            return


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of too many digits, nesting without end
        return None
    return found if isinstance(found, dict) else None


def json_object(path: Path) -> dict[str, Any]:
    """A file that is one JSON object.

    Raises:
        DatasetError: It cannot be read, is too large, or no JSON object.
    """
    try:
        if os.path.getsize(path) > _LARGEST_FILE:
            raise DatasetError(f"{str(path)!r} has more than {_LARGEST_FILE} bytes, as no such file has.")
        found = _parsed(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if found is None:
        raise DatasetError(f"{str(path)!r} is no JSON object: it is torn, or something else.")
    return found


def as_number(value: Any) -> float | None:
    """A number, or one of the words that stand for what JSON cannot say; None: something else.

    What is larger than 1e100 is infinite, and what is smaller than 1e-100 is 0, so that whatever is computed from two
    such numbers is a number too.
    """
    if isinstance(value, str):
        return _NUMBERS.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) > _LARGEST:
        return math.inf if value > 0 else -math.inf
    return 0.0 if abs(value) < _SMALLEST else float(value)


def as_step(value: Any) -> int | None:
    """A whole number that can be a step; None: something else."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value if is_whole and 0 <= value < _LARGEST_STEP else None
