# SPDX-License-Identifier: Apache-2.0
"""A table as one JSON list of records, as HPDv2 and HPDv3 have it, read record by record.

`datasets` reads such a file as a whole: 3 GB of memory for a million pairs, and as a stream several times over.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset

from trl_sipo.data.json_text import too_deep, unique_keys
from trl_sipo.errors import DatasetError

_BETWEEN = re.compile(r"[\s,]*")
_CHARACTERS = 1 << 20  # at a time
_LONGEST_RECORD = 64 << 20  # characters: what has no end within so many is no record
_RECORDS_AT_A_TIME = 10_000
_File = tuple[str, int, int]  # path, bytes and time of change: a file that changed is read anew


def is_json_list(path: str | Path) -> bool:
    """Whether a file begins as a list of JSON: others of the suffix `.json` hold a record a line."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(1024).lstrip().startswith("[")


def read_json_lists(paths: Sequence[str | Path]) -> Dataset:
    """All records of some files, in order. They are copied once, into the cache of `datasets`."""
    features = _features(paths)
    return Dataset.from_generator(
        _rows, features=features, gen_kwargs={"files": _files(paths), "columns": tuple(features)}
    )


def stream_json_lists(paths: Sequence[str | Path]) -> IterableDataset:
    """The same as a stream, whose types are not known before it is read; the first records say its columns."""
    records = itertools.chain.from_iterable(map(json_records, paths))
    columns = dict.fromkeys(name for record in itertools.islice(records, _RECORDS_AT_A_TIME) for name in record)
    if not columns:
        raise DatasetError(f"{paths[0]} is empty: it holds no records")
    return IterableDataset.from_generator(_rows, gen_kwargs={"files": _files(paths), "columns": tuple(columns)})


def json_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a file that holds a list of them, of which one megabyte is in memory.

    Raises:
        DatasetError: the list is broken or cut off, or holds something else than records; a record has a key twice, or
            is nested too deeply. Says where.
    """
    decode, number = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode, 0
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(_CHARACTERS)
        position = text.index("[") + 1
        while True:
            position = _BETWEEN.match(text, position).end()
            if text.startswith("]", position):
                if (text[position + 1 :] + file.read(_CHARACTERS)).strip():
                    raise DatasetError(f"{path}: something follows the list of {number} records; make it one list")
                return
            try:
                record, position = decode(text, position)
            except json.JSONDecodeError as error:  # broken, or it goes on in what was not read yet
                rest = text[position:]
                more = file.read(max(_CHARACTERS, len(rest)))
                if not more or len(rest) > _LONGEST_RECORD:
                    raise DatasetError(f"{path}, record {number}: the list is broken or cut off ({error})") from error
                text, position = rest + more, 0
                continue
            except RecursionError as error:
                raise DatasetError(f"{path}, record {number}: {too_deep()}") from error
            except DatasetError as error:
                raise DatasetError(f"{path}, record {number}: {error}") from error
            yield _checked(record, f"{path}, record {number}")
            number += 1


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DatasetError(f"{where}: expected a record {{...}}, found {type(record).__name__} {record!r:.80}")
    return record


def _files(paths: Sequence[str | Path]) -> list[_File]:
    return [(str(path), Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]


def _features(paths: Sequence[str | Path]) -> Features:
    """Types that hold the values of all records: a column may be null for long, or begin with whole numbers."""
    records = itertools.chain.from_iterable(map(json_records, paths))
    schema = pa.schema([])
    while chunk := list(itertools.islice(records, _RECORDS_AT_A_TIME)):
        found = pa.schema(list(pa.array(chunk).type))
        schema = pa.unify_schemas([schema, found], promote_options="permissive")
    if not schema.names:
        raise DatasetError(f"{paths[0]} is empty: it holds no records")
    return Features.from_arrow_schema(schema)


def _rows(files: list[_File], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Records with all of the columns, null where one lacks it.

    Raises:
        DatasetError: a record of a stream has a column that the first records lack: a label would go unread.
    """
    for path, _, _ in files:
        for number, record in enumerate(json_records(path)):
            unknown = sorted(record.keys() - set(columns))
            if unknown:
                raise DatasetError(
                    f"{path}, record {number}: it has {unknown}, which none of the first {_RECORDS_AT_A_TIME} has. "
                    "Read the data without streaming, or give the first record these columns (null will do)."
                )
            yield {column: record.get(column) for column in columns}
