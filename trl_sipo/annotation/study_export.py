# SPDX-License-Identifier: Apache-2.0
"""All answers of a study as a table, the replaced ones among them."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from trl_sipo.annotation.records import LEFT, RIGHT, Answer, Comparison
from trl_sipo.annotation.store import Store
from trl_sipo.annotation.study_report import csv_text


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
    return {
        "answer_id": answer.answer_id,
        "rater": answer.rater.name,
        "group": answer.rater.group,
        "position": answer.position,
        "kind": answer.task.kind,
        "pair_id": pair.pair_id,
        "prompt_id": pair.prompt_id,
        "prompt": pair.prompt,
        "category": pair.category,
        "left": left,
        "right": right,
        "choice": answer.choice,
        "chosen": {LEFT: left, RIGHT: right}.get(answer.choice, ""),
        "seconds": answer.seconds,
        "answered_at": datetime.fromtimestamp(answer.answered_at, UTC).isoformat(timespec="milliseconds"),
        "is_last": is_last,
    }


def _as_csv(rows: list[dict[str, Any]]) -> str:
    header = list(rows[0]) if rows else []
    return csv_text(header, [list(row.values()) for row in rows])


def _as_json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


WRITERS: Final[Mapping[str, Callable[[list[dict[str, Any]]], str]]] = {".csv": _as_csv, ".jsonl": _as_json_lines}
"""Suffix -> the text of a file of such rows."""
