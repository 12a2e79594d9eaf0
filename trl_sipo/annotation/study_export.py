# SPDX-License-Identifier: Apache-2.0
"""All answers of a study as a table, the replaced ones among them."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from trl_sipo.annotation.records import LEFT, RIGHT, Answer, Comparison
from trl_sipo.annotation.store import Store
from trl_sipo.annotation.study_report import csv_text

COLUMNS: Final = (
    *("answer_id", "rater", "group", "position", "kind", "pair_id", "prompt_id", "prompt", "category"),
    *("left", "right", "choice", "chosen", "seconds", "answered_at", "is_last"),
)


def answer_rows(store: Store) -> list[dict[str, Any]]:
    """A row for each answer, in the order in which they came. `is_last`: no later one replaces it."""
    pairs = {pair.pair_id: pair for pair in store.pairs()}
    answers = store.answers()
    last = {answer.assignment_id: answer.answer_id for answer in answers}
    return [
        _row(answer, pairs[answer.task.pair_id], last[answer.assignment_id] == answer.answer_id) for answer in answers
    ]


def _row(answer: Answer, pair: Comparison, is_last: bool) -> dict[str, Any]:
    left, right = pair.models[::-1] if answer.task.is_flipped else pair.models
    cells = (
        *(answer.answer_id, answer.rater.name, answer.rater.group, answer.position, answer.task.kind),
        *(pair.pair_id, pair.prompt_id, pair.prompt, pair.category, left, right, answer.choice),
        {LEFT: left, RIGHT: right}.get(answer.choice, ""),
        answer.seconds,
        datetime.fromtimestamp(answer.answered_at, UTC).isoformat(timespec="milliseconds"),
        is_last,
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _as_csv(rows: list[dict[str, Any]]) -> str:
    return csv_text(COLUMNS, [list(row.values()) for row in rows])


def _as_json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


WRITERS: Final[Mapping[str, Callable[[list[dict[str, Any]]], str]]] = {".csv": _as_csv, ".jsonl": _as_json_lines}
"""Suffix -> the text of a file of such rows."""
