# SPDX-License-Identifier: Apache-2.0
"""Sets of prompts: composed, from files, or from a column of a dataset."""

import hashlib
import importlib
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trl_sipo.data.formats import read_prompt
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.preference_dataset import stream_columns
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.generation.composing import compose, split_objects
from trl_sipo.generation.names import check_folder_names
from trl_sipo.generation.prompt_files import SUFFIXES, read_rows
from trl_sipo.rewards.requirements import Requirement, describe

logger = logging.getLogger(__name__)

#: Columns that hold a prompt and what it tests, the first that is there. "tag" is GenEval's.
PROMPT_COLUMNS: Final = ("prompt", "caption", "text", "Prompt")
CATEGORY_COLUMNS: Final = ("category", "tag", "Category")
#: Sets that a package above this one composes, by the first word of their specification: "module:function", which
#: takes the rest of the specification and gives pairs of prompt and category.
COMPOSED_ELSEWHERE: Final = {
    "fashion": "trl_sipo.demo.prompt_sets:fashion_prompts",
    "moving-fashion": "trl_sipo.demo.prompt_sets:moving_fashion_prompts",
}


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and what is known of it.

    Attributes:
        prompt_id: Its name in the set, safe as that of a folder.
        prompt: The text.
        category: What it tests, such as "counting".
        source: Where it comes from, such as a file's name.
    """

    prompt_id: str
    prompt: str
    category: str | None = None
    source: str | None = None


def load_prompts(spec: str, *, limit: int | None = None, seed: int = 0) -> list[PromptRecord]:
    """The prompts of a set, each once.

    Args:
        spec: one of

            - "composed", "composed:200", "composed:train", "composed:test:200": composed in GenEval's structure and
              proportions (`trl_sipo.generation.composing`), 553 unless a number is given; "train" and "test" share no
              object;
            - "fashion" and "moving-fashion": of the demo's models, with ":train" and ":held-out";
            - "dataset:NAME", "dataset:NAME:COLUMN", "dataset:NAME:COLUMN:SPLIT": a column of a dataset on the hub or
              of a local folder or file; by default its "prompt" or "caption", and the split "train";
            - a file with one prompt a line (.txt), or with columns `prompt`, optionally `prompt_id` and `category`
              (.json, .jsonl, .csv, .parquet).
        limit: at most so many of them, chosen at random; they stay in order.
        seed: of composing and choosing.

    Returns:
        The prompts. Where the set names none, `prompt_id` is made of the text, so that it is the same in every set,
        and whatever else is in it.

    Raises:
        ConfigurationError: a specification that names nothing, or asks for more than there is.
        DatasetError: a file or dataset that is not there, cannot be read, or holds no prompts; names that cannot be
            those of folders, or are given twice.
    """
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit={limit} prompts: at least one is needed.")
    kind, _, rest = spec.partition(":")
    if kind == "composed":
        rows = _rows_of(_composed(rest, seed))
    elif kind in COMPOSED_ELSEWHERE:
        rows = _composed_elsewhere(COMPOSED_ELSEWHERE[kind], rest)
    elif kind == "dataset":
        rows = _dataset_rows(rest)
    else:
        rows = read_rows(_existing_file(spec))
    records = _records(rows, spec)
    if limit is None or limit >= len(records):
        return records
    return [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), limit))]


def compose_prompts(requirements: Iterable[Requirement], source: str = "composed") -> list[PromptRecord]:
    """Prompts that ask for what `compose` drew, with its categories."""
    return _records(_rows_of(requirements), source)


def prompt_id_of(prompt: str) -> str:
    """A name made of the text alone: its first letters and digits, and a hash of all of it."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:10]
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-")
    return f"{words}-{digest}" if words else digest


def _rows_of(requirements: Iterable[Requirement]) -> Iterator[dict[str, str]]:
    return ({"prompt": describe(requirement), "category": requirement.category} for requirement in requirements)


def _composed(rest: str, seed: int) -> list[Requirement]:
    """Of "200", "train", "train:200" or nothing."""
    words = rest.split(":") if rest else []
    part = words.pop(0) if words and words[0] in ("train", "test") else None
    if len(words) > 1 or not all(word.isdecimal() for word in words):
        raise ConfigurationError(f"'composed:{rest}' is no prompt set: write composed[:train|:test][:NUMBER].")
    number = int(words[0]) if words else None
    if part is None:
        return compose(number, seed=seed)
    train, test = split_objects()  # of one seed, so that the parts never meet, whatever is drawn of them
    return compose(number, seed=seed, only_objects=train if part == "train" else test)


def _composed_elsewhere(target: str, rest: str) -> list[dict[str, str]]:
    module, function = target.split(":")
    pairs = getattr(importlib.import_module(module), function)(rest or None)
    return [{"prompt": prompt, "category": category} for prompt, category in pairs]


def _existing_file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.is_dir():
        raise DatasetError(f"{spec!r} is a folder; write dataset:{spec} to take the prompts of a dataset.")
    if not path.is_file():
        kinds = ", ".join(("composed", *COMPOSED_ELSEWHERE, "dataset:NAME"))
        raise DatasetError(
            f"there is no prompt set {spec!r}: no file of that name (working directory: {Path.cwd()}), and none of "
            f"{kinds}."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise DatasetError(f"prompts are not read from {spec!r}: expected a file of {', '.join(SUFFIXES)}.")
    return path


def _dataset_rows(rest: str) -> Iterator[Mapping[str, Any]]:
    """Rows of "NAME[:COLUMN[:SPLIT]]", with the column under the name "prompt"."""
    words = [rest] if Path(rest).expanduser().exists() else rest.split(":", 2)
    name, column, split = (*words, "", "")[:3]
    if not name:
        raise ConfigurationError("'dataset:' names no dataset: write dataset:NAME[:COLUMN[:SPLIT]].")
    # Of a dataset on the hub, only the files of the split are fetched, and no more of them than is read.
    is_stream = not Path(name).expanduser().exists() and "[" not in split
    dataset: Any = load_preference_dataset(name, split=split or "train", streaming=is_stream)
    columns = stream_columns(dataset) if is_stream else getattr(dataset, "column_names", ())
    column = column or _first(PROMPT_COLUMNS, columns) or ""
    if column not in columns:
        wanted = f"column {column!r}" if column else f"column of {', '.join(PROMPT_COLUMNS)}"
        raise DatasetError(f"the dataset {name!r} has no {wanted}; it has {list(columns)}.")
    kept = [column, *(other for other in ("prompt_id", *CATEGORY_COLUMNS) if other in columns and other != column)]
    # Without the images, which would be decoded.
    return ({**row, "prompt": row[column]} for row in dataset.select_columns(kept))


def _first(names: Sequence[str], columns: Iterable[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _records(rows: Iterable[Mapping[str, Any]], source: str) -> list[PromptRecord]:
    """Rows as records: without empty prompts, and without those that came before."""
    records: dict[str, PromptRecord] = {}
    empty = repeated = 0
    for number, row in enumerate(rows):
        where = f"{source}, prompt {number}"
        record = _record(row, source, where)
        if record is None:
            empty += 1
        elif record.prompt in records:
            repeated += 1
        else:
            records[record.prompt] = record
    if not records:
        raise DatasetError(f"the prompt set {source!r} holds no prompts ({empty} are empty).")
    for count, what in ((empty, "empty"), (repeated, "repeated")):
        if count:
            logger.warning("%s: %d prompts are %s and left out; %d are left.", source, count, what, len(records))
    _check_names(records.values(), source)
    return list(records.values())


def _record(row: Mapping[str, Any], source: str, where: str) -> PromptRecord | None:
    column = _first(PROMPT_COLUMNS, row)
    if column is None:
        raise DatasetError(f"{where}: no column of {', '.join(PROMPT_COLUMNS)}; the columns are {list(row)}.")
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    prompt = read_prompt(value, where=where).strip()
    name = row.get("prompt_id")
    category_column = _first(CATEGORY_COLUMNS, row)
    category = None if category_column is None else row[category_column]
    return PromptRecord(
        prompt_id=prompt_id_of(prompt) if name in (None, "") else str(name),
        prompt=prompt,
        category=None if category in (None, "") else str(category),
        source=source,
    )


def _check_names(records: Iterable[PromptRecord], source: str) -> None:
    try:
        check_folder_names([record.prompt_id for record in records], "prompt")
    except ConfigurationError as error:
        raise DatasetError(f"the prompt set {source!r}: {error}") from error
