# SPDX-License-Identifier: Apache-2.0
"""The tables of an evaluation, once: rows of text for the page and the Markdown, and one CSV of numbers."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]
"""`evaluation.json`."""


@dataclass(frozen=True)
class Table:
    """A titled table of text.

    Attributes:
        title: Its heading.
        note: How to read it.
        header: Names of the columns.
        rows: As many cells each.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float | None) -> str:
    """Four significant digits; "-" of what is unbounded or not known."""
    return "-" if value is None else f"{value:.4g}"


def with_interval(interval: Mapping[str, Any], *, percent: bool = False) -> str:
    """An estimate and its interval, such as "0.512 [0.430, 0.594]"."""
    show = (lambda value: "-" if value is None else f"{value:.1%}") if percent else number
    return f"{show(interval['estimate'])} [{show(interval['low'])}, {show(interval['high'])}]"


def p_value(value: float | None) -> str:
    """Three digits after the point; what is below them is not 0."""
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def verdict(report: Report) -> list[str]:
    """In sentences: which candidate wins by which reward, and what it paid for it."""
    sentences = []
    for row in report["metrics"]:
        against = row["against_base"]
        if against is None:
            continue
        rate, corrected = against["win_rate"], row["corrected_win_p_value"]
        alpha = 1 - rate["level"]
        if corrected > alpha:
            outcome = "cannot be told from"
        else:
            outcome = "wins against" if rate["estimate"] > 0.5 else "loses against"
        sentences.append(
            f"By {row['metric']}, {row['model']} {outcome} {report['base']}: win rate "
            f"{with_interval(rate, percent=True)}, p {_equals(corrected)} corrected for "
            f"{_num_tests(report)} comparison{'s' * (_num_tests(report) > 1)}."
        )
    for name, differences in report.get("drawn_otherwise", {}).items():
        sentences.append(
            f"{name} was drawn otherwise than {report['base']}, so that not the weights alone are compared: "
            f"{'; '.join(differences)}."
        )
    for name, variety in report["variety"].items():
        spread = variety["relative_spread"]
        if spread["high"] is not None and spread["high"] < 1:
            sentences.append(
                f"{name} varies less than {report['base']}: its samples of a prompt lie {spread['estimate']:.0%} as "
                "far apart. A reward can be raised by drawing one picture again and again."
            )
    return sentences


def _equals(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def _num_tests(report: Report) -> int:
    return sum(row["against_base"] is not None for row in report["metrics"])


def tables(report: Report) -> list[Table]:
    """All tables that a report has something for."""
    found = [_metrics(report), _wins(report), _rewards(report)]
    for part in (_categories(report), _variety(report), _preferences(report)):
        if part.rows:
            found.append(part)
    return found


def _metrics(report: Report) -> Table:
    rows = [(row["metric"], row["model"], with_interval(row["mean"])) for row in report["metrics"]]
    note = f"Means over all samples, with intervals of {_level(report)} that treat the prompt as the trial."
    return Table("Scores", note, ("reward", "model", "mean"), rows)


def _wins(report: Report) -> Table:
    rows = [
        (
            row["metric"],
            row["model"],
            with_interval(row["against_base"]["win_rate"], percent=True),
            with_interval(row["against_base"]["difference"]),
            p_value(row["against_base"]["win_p_value"]),
            p_value(row["corrected_win_p_value"]),
            str(row["against_base"]["num_ties"]),
        )
        for row in report["metrics"]
        if row["against_base"] is not None
    ]
    note = (
        f"Against {report['base']}, sample by sample from the same prompt and the same noise; a tie counts one half. "
        "p of a test that exchanges the models prompt by prompt, and corrected (Holm) for the number of rows."
    )
    header = ("reward", "model", "win rate", "difference", "p", "corrected p", "ties")
    return Table(f"Paired with {report['base']}", note, header, rows)


def _categories(report: Report) -> Table:
    rows = [
        (
            row["category"],
            row["metric"],
            row["model"],
            with_interval(row["mean"]),
            "-" if row["against_base"] is None else with_interval(row["against_base"]["win_rate"], percent=True),
        )
        for row in report["categories"]
    ]
    note = "By category of the prompts. With many categories some differ by chance; no p is given for that reason."
    return Table("Categories", note, ("category", "reward", "model", "mean", "win rate"), rows)


def _variety(report: Report) -> Table:
    rows = [
        (name, with_interval(row["relative_spread"]), with_interval(row["drift"]))
        for name, row in report["variety"].items()
    ]
    note = (
        f"On {report['features']}. Spread: how far the samples of a prompt lie apart, beside {report['base']}; below "
        "1 the model varies less. Drift: how far a sample moved from the base's of the same noise; 1 is as far as "
        "another seed. A score that rises while the spread falls is the mark of reward hacking."
    )
    return Table("Variety and drift", note, ("model", "spread", "drift"), rows)


def _preferences(report: Report) -> Table:
    rows = [
        (
            name,
            "all" if row["time"] is None else f"{row['time']:.2f}",
            with_interval(row["accuracy"], percent=True),
            with_interval(row["margin"]),
            with_interval(row["chosen_drift"]),
            with_interval(row["rejected_drift"]),
        )
        for name, levels in report["preferences"].items()
        for row in levels
    ]
    note = (
        "Held-out pairs, by noise level (time 0 is clean, 1 pure noise): how often the implicit reward ranks a pair "
        f"as it is labelled, its margin at beta {number(report['beta'])}, and how the errors on both arms changed. A "
        "drift of the chosen arm above 0 means that the model has forgotten what was preferred."
    )
    header = ("model", "time", "accuracy", "margin", "drift, chosen", "drift, rejected")
    return Table("Implicit preferences", note, header, rows)


def _rewards(report: Report) -> Table:
    rows = [
        (name, info["convention"], "higher" if info["higher_is_better"] else "lower", info["licence"])
        for name, info in report["rewards"].items()
    ]
    return Table("What the scores are", "", ("reward", "formula", "better", "licence"), rows)


def _level(report: Report) -> str:
    return f"{report['settings']['level']:.0%}"


def metrics_csv(report: Report) -> str:
    """All numbers of the rewards, a row for each model, reward and category, as CSV; empty: all prompts, or no base.

    Texts that a spreadsheet would take for a formula are quoted by an apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    ends = ("", "_low", "_high")
    compared = ("win_rate", "difference")
    names = [f"{name}{end}" for name in ("mean", *compared) for end in ends]
    writer.writerow(
        ["model", "metric", "category", *names, "win_p_value", "corrected_win_p_value", "samples", "prompts", "ties"]
    )
    for row in [*report["metrics"], *report["categories"]]:
        against = row["against_base"] or {}
        intervals = [row["mean"], *(against.get(name, {}) for name in compared)]
        cells = [interval.get(end) for interval in intervals for end in ("estimate", "low", "high")]
        counts = [against.get(name) for name in ("num_samples", "num_prompts", "num_ties")]
        texts = [plain_cell(row[name] or "") for name in ("model", "metric", "category")]
        writer.writerow([*texts, *cells, against.get("win_p_value"), row["corrected_win_p_value"], *counts])
    return buffer.getvalue()


def plain_cell(text: str) -> str:
    """A text for a cell of CSV that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = markdown_lines(report["title"], verdict(report))
    for table in tables(report):
        lines += markdown_table(table)
    settings = json.dumps(report["settings"], indent=1)
    lines += ["## How it was made", "", *_code(report["command"]), "", "```json", settings, "```", ""]
    return "\n".join(lines)


def markdown_lines(title: str, sentences: Sequence[str]) -> list[str]:
    """A title, and what is to be said first as a list, as lines of Markdown."""
    return [f"# {_escaped(title)}", "", *[f"- {_escaped(sentence)}" for sentence in sentences], ""]


def _code(text: str) -> list[str]:
    """Indented, which no character of the text can end."""
    return [f"    {line}" for line in text.splitlines()]


def markdown_table(table: Table) -> list[str]:
    """Title, note and table as lines of Markdown."""
    note = [_escaped(table.note), ""] if table.note else []
    rows = [_line(table.header), _line(["---"] * len(table.header)), *[_line(row) for row in table.rows]]
    return [f"## {_escaped(table.title)}", "", *note, *rows, ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown and what renders it take for text, on one line."""
    flat = " ".join(text.split())
    for character in "\\|<>`*_[]":
        flat = flat.replace(character, f"\\{character}")
    return flat
