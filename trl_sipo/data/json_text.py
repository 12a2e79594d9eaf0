# SPDX-License-Identifier: Apache-2.0
"""Tables of others as text: a name that stands twice is refused, and so is nesting that parsers die of."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_sipo.errors import DatasetError

DEEPEST = 100  # lists and objects within one another; latents of clips take four
_LONGEST_LINE = 256 << 20  # bytes: as much as a record may have before it is taken for none
# To the end where it has none: else each quotation mark after the first would be tried, up to the end again.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_OPENING, _CLOSING = b"[{", b"]}"
_NO_BRACKETS = bytes(set(range(256)) - set(_OPENING + _CLOSING))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook`: of two values under one key, the first would be dropped without a word."""
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise DatasetError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.80} stands twice")
    return record


def check_header(columns: Sequence[str]) -> None:
    """Raise DatasetError when two columns of a CSV are of one name, of which one would be dropped without a word."""
    twice = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twice is not None:
        raise DatasetError(f"the column {twice!r:.80} stands twice")


def check_csv_header(path: Path) -> None:
    """As [`check_header`], of a file; pandas would call the second column by another name."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        check_header(next(csv.reader(file), ()))


def parse_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        DatasetError: it is broken, has a key twice, or is nested too deeply; says where.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise DatasetError(f"{where}: {too_deep()}") from error
    except (ValueError, DatasetError) as error:  # of more digits than Python takes, it is no JSONDecodeError
        raise DatasetError(f"{where} cannot be read: {error}") from error


def too_deep() -> str:
    """What is wrong with a nested bomb."""
    return f"lists or objects lie more than {DEEPEST} deep within one another, as no preference data has them"


def check_json_lines(path: Path) -> None:
    """Look for what the reader of JSON Lines in pyarrow does not survive, or takes without a word.

    Raises:
        DatasetError: nesting of which the process would die, invalid UTF-8, a line without an end; names the line.
    """
    depth = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > _LONGEST_LINE:
                raise DatasetError(f"{where}: it has more than {_LONGEST_LINE} bytes; is this a table?")
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DatasetError(f"{where} is no UTF-8 text ({error.reason} at byte {error.start})") from error
            opened, closed = (sum(map(line.count, (b[:1], b[1:]))) for b in (_OPENING, _CLOSING))
            if opened != closed or opened > DEEPEST:
                depth, deepest = _depths(line, depth)
                if deepest > DEEPEST:
                    raise DatasetError(f"{where}: {too_deep()}")


def _depths(line: bytes, depth: int) -> tuple[int, int]:
    """How deep the end of a line lies, and its deepest place; brackets within strings are text."""
    brackets = np.frombuffer(_STRING.sub(b"", line).translate(None, _NO_BRACKETS), np.uint8)
    depths = depth + np.cumsum(np.where(np.isin(brackets, list(_OPENING)), 1, -1))
    return (int(depths[-1]), int(depths.max())) if len(depths) else (depth, depth)
