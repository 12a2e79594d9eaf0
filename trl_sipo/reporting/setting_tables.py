# SPDX-License-Identifier: Apache-2.0
"""What runs were told, side by side: settings that differ first, then all, environments, commands and starts."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from trl_sipo.printing import HIDDEN, names_secret, without_secrets, words_without_secrets
from trl_sipo.reporting.charts import short
from trl_sipo.reporting.run_files import Run, started_at
from trl_sipo.reporting.run_lines import as_number

_LONGEST_VALUE, _MOST_ROWS, _DEEPEST = 300, 1000, 4
_FACTS = (
    "method", "model", "backbone", "prediction_type", "beta_description", "lora", "trained_parameters", "train_pairs",
    "eval_pairs", "mask_threshold", "clip_range", "importance_steps", "num_train_timesteps",
)  # fmt: skip
Rows = list[list[str]]


def setting_rows(runs: Sequence[Run]) -> tuple[Rows, Rows]:
    """Rows of a name and each run's value: those that differ, and all of them; of one run the first are none."""
    columns = [flat({name: run.last_start[name] for name in _FACTS if name in run.last_start}) for run in runs]
    columns = [{**facts, **flat(run.settings)} for facts, run in zip(columns, runs, strict=True)]
    return _compared(columns)


def environment_rows(runs: Sequence[Run]) -> tuple[Rows, Rows]:
    """The same of machines and versions."""
    found = [run.last_start.get("environment") for run in runs]
    return _compared([flat(value) if isinstance(value, Mapping) else {} for value in found])


def _compared(columns: Sequence[Mapping[str, str]]) -> tuple[Rows, Rows]:
    names = list(dict.fromkeys(name for column in columns for name in column))[:_MOST_ROWS]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1], rows


def flat(values: Mapping[str, Any], before: str = "", depth: int = 0) -> dict[str, str]:
    """Names and texts of values, those within others under both names; without secrets, whoever wrote them down."""
    found: dict[str, str] = {}
    for key, value in list(values.items())[:_MOST_ROWS]:
        name = f"{before}{key}"[:_LONGEST_VALUE]
        if isinstance(value, Mapping) and value and depth < _DEEPEST:
            found |= flat(value, f"{name}.", depth + 1)
        else:
            found[name] = HIDDEN if names_secret(str(key)) and value else _text(value)
    return found


def _text(value: Any) -> str:
    if value is None:
        return "none"
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        text = "nested too deeply to be shown"
    text = without_secrets(text)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def command_of(start: Mapping[str, Any]) -> str:
    """The command of a start, as it can be typed again; empty where there was none, as in a notebook."""
    words = start.get("command")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return ""
    return shlex.join(words_without_secrets(words))


def start_rows(run: Run) -> Rows:
    """One row per start: when, from which step, and which settings differ from the start before."""
    rows: Rows = []
    before: Mapping[str, str] | None = None
    for start in run.starts:
        settings = start.get("settings")
        now = flat(settings) if isinstance(settings, Mapping) else {}
        changed = [
            f"{name}: {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
            for name in dict.fromkeys([*now, *before])
            if before.get(name) != now.get(name)
        ] if before is not None else []  # fmt: skip
        at = short(as_number(start.get("step")))
        rows.append([started_at(start) or "-", at, "; ".join(changed)[: 4 * _LONGEST_VALUE] or "-"])
        before = now
    return rows
