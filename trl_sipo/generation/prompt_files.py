# SPDX-License-Identifier: Apache-2.0
"""Reads files of prompts: lines of text, JSON, JSON Lines, CSV and Parquet."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet

from trl_sipo.data.json_text import check_header, parse_json
from trl_sipo.errors import DatasetError

Rows = Iterator[Mapping[str, Any]]


def read_rows(path: Path) -> Rows:
    """The rows of a file by its suffix, one of `SUFFIXES`; of lines of text, each a `prompt`.

    Raises:
        DatasetError: the file is broken, or no UTF-8; says where.
    """
    try:
        yield from _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no UTF-8 ({error.reason} at byte {error.start}).") from error
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _read_lines(path: Path) -> Rows:
    # Not `splitlines`: prompts may hold other separators than the ends of lines.
    return ({"prompt": line} for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())


def _read_json(path: Path) -> Rows:
    """A list of texts or of objects; or, as some write it, an object a line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    for number, value in enumerate(parse_json(text, str(path))):
        yield _as_row(value, f"{path}, entry {number}")


def _read_json_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _as_row(parse_json(line, where), where)


def _as_row(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: expected a text or an object with `prompt`, found {json.dumps(value)[:80]}.")
    return value


def _read_csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        check_header(reader.fieldnames or ())
        for row in reader:
            if None in row or None in row.values():
                raise DatasetError(f"{path}, line {reader.line_num}: not as many cells as the header has.")
            yield row


def _read_parquet(path: Path) -> Rows:
    """A row group at a time, without columns of nested values, such as images."""
    with pa.parquet.ParquetFile(path) as file:
        flat = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        for batch in file.iter_batches(columns=flat):
            yield from batch.to_pylist()


_READERS: Final[dict[str, Callable[[Path], Rows]]] = {
    ".txt": _read_lines,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES: Final = tuple(_READERS)
