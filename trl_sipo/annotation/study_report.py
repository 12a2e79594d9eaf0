# SPDX-License-Identifier: Apache-2.0
"""A study's result as files: a page, Markdown, JSON, and tables of couples, pairs and raters as CSV.

They tell which model is which: they are for whoever runs the study.
"""

import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trl_sipo import __version__
from trl_sipo.annotation.rater_checks import CheckSettings
from trl_sipo.annotation.records import TIE
from trl_sipo.annotation.study_analysis import CoupleResult, Result, StudyAnalysis
from trl_sipo.annotation.votes import FIRST, SECOND
from trl_sipo.data.cache.shards import write_whole
from trl_sipo.evaluation.evaluate import as_json
from trl_sipo.evaluation.statistics import Interval
from trl_sipo.reporting.evaluation_tables import (
    Table,
    markdown_lines,
    markdown_table,
    p_value,
    plain_cell,
    with_interval,
)
from trl_sipo.reporting.page import Page

JSON_FILE, HTML_FILE, MARKDOWN_FILE = "study.json", "report.html", "report.md"
COUPLES_FILE, PAIRS_FILE, RATERS_FILE = "results.csv", "pairs.csv", "raters.csv"

# Blue, grey and vermilion of Okabe and Ito, with the colour of text on each.
_COLOURS: Final = {SECOND: ("#0072b2", "#fff"), TIE: ("#c3c9d0", "#000"), FIRST: ("#d55e00", "#000")}
_CHART_WIDTH, _CHART_ROW, _BAR = 320, 58, 24
_LONGEST_NAME = 15  # characters
_LEAST_WIDTH_OF_TEXT = 0.1  # of the bar


def write_report(analysis: StudyAnalysis, output: Path, *, command: str, checks: CheckSettings) -> list[Path]:
    """Write all files; those of an earlier report are replaced.

    Args:
        command: By which it was made.
        checks: The thresholds that were used.

    Raises:
        StorageError: They cannot be written.
    """
    contents = {
        JSON_FILE: json.dumps(report_json(analysis, command, checks), indent=1, ensure_ascii=False) + "\n",
        HTML_FILE: page(analysis, command, checks),
        MARKDOWN_FILE: markdown(analysis, command, checks),
        COUPLES_FILE: couples_csv(analysis),
        PAIRS_FILE: pairs_csv(analysis.kept),
        RATERS_FILE: raters_csv(analysis),
    }
    for name, text in contents.items():
        write_whole(output / name, lambda path, text=text: path.write_text(text, encoding="utf-8", newline=""))
    return [output / name for name in contents]


def report_json(analysis: StudyAnalysis, command: str, checks: CheckSettings) -> dict[str, Any]:
    """All numbers, as JSON has them; of single pairs the labels are in `pairs.csv`."""
    results = {}
    for name, result in (("kept", analysis.kept), ("everyone", analysis.everyone)):
        results[name] = as_json(result)
        del results[name]["votes"]
    return {
        "title": analysis.study.title,
        "is_partial": analysis.is_partial,
        "verdict": verdict(analysis),
        **{name: getattr(analysis, name) for name in ("num_answered", "num_tasks", "num_stored", "num_skipped")},
        "raters": as_json(analysis.checks),
        "num_discarded": len(analysis.discarded),
        **results,
        "thresholds": as_json(checks),
        "study": as_json(analysis.study),
        "command": command,
        "version": __version__,
    }


# ------------------------------------------------------------------------------------------------------- in words


def verdict(analysis: StudyAnalysis) -> list[str]:
    """In sentences: whether it is finished, who wins, and whether it depends on the discarded raters."""
    sentences = []
    if analysis.is_partial:
        sentences.append(
            f"This study is not finished: {analysis.num_answered} of {analysis.num_tasks} tasks are answered. What "
            "follows may change; a p-value that is looked at until it is small proves nothing."
        )
    if not analysis.kept.couples:
        sentences.append("No pair is judged by a rater who is kept: there is no result.")
    sentences += [_outcome(couple, len(analysis.kept.couples)) for couple in analysis.kept.couples]
    if analysis.discarded:
        names = ", ".join(check.rater.name for check in analysis.discarded)
        sentences.append(
            f"{len(analysis.discarded)} of {len(analysis.checks)} raters are left out ({names}). {_without(analysis)}"
        )
    return sentences


def _outcome(couple: CoupleResult, num_tests: int) -> str:
    corrected = couple.corrected_p_value if couple.corrected_p_value is not None else couple.p_value
    if corrected > 1 - couple.win_rate.level:
        outcome = "cannot be told from"
    else:
        outcome = "wins against" if couple.win_rate.estimate > 0.5 else "loses against"
    shown = p_value(corrected)
    equals = shown if shown.startswith("<") else f"= {shown}"
    return (
        f"{couple.second} {outcome} {couple.first}: win rate {_percent(couple.win_rate)} "
        f"({couple.wins} wins, {couple.ties} ties, {couple.losses} losses), p {equals}"
        + (f" corrected for {num_tests} comparisons." if num_tests > 1 else ".")
    )


def _without(analysis: StudyAnalysis) -> str:
    kept = {(couple.first, couple.second): couple for couple in analysis.kept.couples}
    parts = [
        f"{couple.win_rate.estimate:.1%} instead of {kept[couple.first, couple.second].win_rate.estimate:.1%} for "
        f"{couple.second} against {couple.first}"
        for couple in analysis.everyone.couples
        if (couple.first, couple.second) in kept
    ]
    return f"With their answers the win rates are {'; '.join(parts)}." if parts else ""


def _percent(interval: Interval) -> str:
    return with_interval(as_json(interval), percent=True)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ------------------------------------------------------------------------------------------------------- tables


def tables(analysis: StudyAnalysis) -> list[Table]:
    """All tables, in the order of the page."""
    kept, everyone = analysis.kept, analysis.everyone
    found = [_couples_table("Results", _RESULTS_NOTE, kept.couples), _groups_table(kept.couples)]
    if kept.categories:
        found.append(
            _couples_table(
                "By category", "Without p-values: of many, one in twenty is below 0.05 by chance.", kept.categories
            )
        )
    if analysis.discarded:
        note = "The same with the answers of all raters, the discarded ones among them."
        found.append(_couples_table("With every rater", note, everyone.couples))
    found += [_agreement_table(analysis), _raters_table(analysis), _discarded_table(analysis)]
    return [table for table in found if table.rows]


_RESULTS_NOTE = (
    "By majority within each group, then across groups; a lead that is shared is a tie. The win rate is that of the "
    "first named, a tie counts one half. Intervals and p-values take prompts as drawn at random and the raters as "
    "given: they say how it would be with other prompts, not with other raters. What other raters might say is "
    "seen in how far the groups differ. The share of answers counts single answers, without majorities. Where most "
    "prompts came out alike an interval is a cautious bound, which may hold one half while the exact test does not."
)


def _couples_table(title: str, note: str, couples: Sequence[CoupleResult]) -> Table:
    has_categories = any(couple.category is not None for couple in couples)
    is_corrected = len(couples) > 1 and not has_categories
    header = [
        "models",
        *["category"] * has_categories,
        "pairs judged",
        "wins",
        "ties",
        "losses",
        "win rate",
        *["p"] * (not has_categories),
    ]
    rows = [
        [
            f"{couple.second} against {couple.first}",
            *[couple.category or ""] * has_categories,
            f"{couple.wins + couple.ties + couple.losses} of {couple.num_pairs}",
            *map(str, (couple.wins, couple.ties, couple.losses)),
            _percent(couple.win_rate),
            *[p_value(couple.p_value)] * (not has_categories),
            *[p_value(couple.corrected_p_value)] * is_corrected,
            _percent(couple.share_of_answers),
        ]
        for couple in couples
    ]
    return Table(title, note, [*header, *["p corrected"] * is_corrected, "share of answers"], rows)


def _groups_table(couples: Sequence[CoupleResult]) -> Table:
    groups = sorted({group for couple in couples for group in couple.by_group})
    rows = [
        [
            f"{couple.second} against {couple.first}",
            *[_share(couple.by_group.get(group)) for group in groups],
            f"{couple.num_in_all_groups} of {couple.num_pairs}",
        ]
        for couple in couples
    ]
    header = ["models", *[f"group {group}" for group in groups], "pairs judged by all groups"]
    return Table("By group", "Win rates by the labels of each group alone.", header, rows)


def _agreement_table(analysis: StudyAnalysis) -> Table:
    columns = [("kept raters", analysis.kept)]
    if analysis.discarded:
        columns.append(("every rater", analysis.everyone))
    results = [result for _, result in columns]
    rows = [
        ("Krippendorff's alpha (nominal)", *[_number(r.agreement.alpha) for r in results]),
        ("Fleiss' kappa", *[_kappa(r) for r in results]),
        ("labels that are the final ones", *[_mean_share(r.agreement.with_final) for r in results]),
        ("labels that most others gave", *[_mean_share(r.agreement.with_others) for r in results]),
        ("pairs on which all groups agree", *[_share(r.agreement.groups_alike) for r in results]),
        ("left, of decisions that are no ties", *[_side(r) for r in results]),
        ("p of side", *[p_value(r.side_bias.p_value) for r in results]),
    ]
    note = (
        "Alpha and kappa are 1 where all agree and 0 where they agree as by chance. The final label is made of a "
        "rater's own too, what others gave is not. Sides were drawn at random, so that a share of left far from one "
        "half shows raters who go by the side; its interval and p-value take raters as drawn at random."
    )
    return Table("Agreement and sides", note, ["", *[name for name, _ in columns]], rows)


def _kappa(result: Result) -> str:
    kappa = result.agreement.kappa
    return f"{_number(kappa.value)} ({kappa.num_items} pairs of {kappa.num_labels} answers)"


def _side(result: Result) -> str:
    return "-" if result.side_bias.share_of_left is None else _percent(result.side_bias.share_of_left)


def _mean_share(shares: Mapping[str, float]) -> str:
    return _share(sum(shares.values()) / len(shares) if shares else None)


def _raters_table(analysis: StudyAnalysis) -> Table:
    header = ("rater", "group", "answered", "left", "right", "ties", "p of side", "gold right", "reversed")
    times = ("median seconds", "minutes", "as the final label", "as most others", "discarded")
    agreement = analysis.everyone.agreement
    rows = []
    for check in analysis.checks:
        name = check.rater.name
        rows.append(
            [
                name,
                str(check.rater.group),
                f"{check.num_answered} of {check.num_tasks}",
                *map(str, (check.num_left, check.num_right, check.num_ties)),
                p_value(check.side_p_value),
                f"{check.gold_right} of {check.gold_total}",
                f"{check.reversed} of {check.mirrored}",
                "-" if check.median_seconds is None else f"{check.median_seconds:.1f}",
                f"{check.total_seconds / 60:.1f}",
                _share(agreement.with_final.get(name)),
                _share(agreement.with_others.get(name)),
                "yes" if check.reasons else "no",
            ]
        )
    note = (
        f"{analysis.num_stored} answers are stored, those that were replaced by later ones among them; "
        f"{analysis.num_skipped} tasks are skipped. Reversed are mirrored repeats with the opposite choice."
    )
    return Table("Raters", note, [*header, *times], rows)


def _discarded_table(analysis: StudyAnalysis) -> Table:
    rows = [[check.rater.name, "; ".join(check.reasons)] for check in analysis.discarded]
    return Table("Discarded raters", "By thresholds that are below.", ("rater", "reason"), rows)


# ------------------------------------------------------------------------------------------------------- files


def page(analysis: StudyAnalysis, command: str, checks: CheckSettings) -> str:
    """The report as HTML."""
    document = Page(analysis.study.title)
    for sentence in verdict(analysis):
        document.paragraph(sentence, "verdict")
    if analysis.kept.couples:
        document.parts.append(chart(analysis.kept.couples))
    for table in tables(analysis):
        document.heading(table.title)
        if table.note:
            document.paragraph(table.note, "note")
        document.table(table.header, table.rows)
    document.heading("How it was made")
    document.code(command)
    document.code(_how(analysis, checks))
    return document.render()


def _how(analysis: StudyAnalysis, checks: CheckSettings) -> str:
    return json.dumps({"thresholds": as_json(checks), "study": as_json(analysis.study)}, indent=1, ensure_ascii=False)


def chart(couples: Sequence[CoupleResult]) -> str:
    """Wins, ties and losses of each two models as bars: SVG without a style of its own, narrow enough for a phone."""
    rows = "".join(_chart_row(couple, number * _CHART_ROW) for number, couple in enumerate(couples))
    height = len(couples) * _CHART_ROW
    spoken = ". ".join(_outcome(couple, len(couples)) for couple in couples)
    return (
        f'<figure><svg role="img" aria-label="{html.escape(spoken)}" width="{_CHART_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_CHART_WIDTH} {height}" font-size="13" fill="currentColor">{rows}</svg>'
        "<figcaption>Blue: wins of the first named. Grey: ties. Orange: losses. The win rate is the middle of the "
        "grey part; the line marks one half.</figcaption></figure>"
    )


def _chart_row(couple: CoupleResult, top: int) -> str:
    total = couple.wins + couple.ties + couple.losses
    parts, left = [], 0.0
    for label, number in ((SECOND, couple.wins), (TIE, couple.ties), (FIRST, couple.losses)):
        colour, text = _COLOURS[label]
        width = _CHART_WIDTH * number / total
        parts.append(f'<rect x="{left:.1f}" y="{top + 22}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>')
        if number >= _LEAST_WIDTH_OF_TEXT * total:
            middle = left + width / 2
            parts.append(f'<text x="{middle:.1f}" y="{top + 39}" text-anchor="middle" fill="{text}">{number}</text>')
        left += width
    first, second = (shorten(name, _LONGEST_NAME) for name in (couple.first, couple.second))
    name = html.escape(f"{second} against {first}: {couple.win_rate.estimate:.1%}")
    half = f'<path d="M{_CHART_WIDTH / 2} {top + 20}v{_BAR + 6}" stroke="currentColor" stroke-width="2"/>'
    return f'<text x="0" y="{top + 15}">{name}</text>{"".join(parts)}{half}'


def shorten(name: str, length: int) -> str:
    """A name of at most so many characters; the tables have it in full."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def markdown(analysis: StudyAnalysis, command: str, checks: CheckSettings) -> str:
    """The report as Markdown."""
    lines = markdown_lines(analysis.study.title, verdict(analysis))
    for table in tables(analysis):
        lines += markdown_table(table)
    code = [f"    {line}" for line in (command, *_how(analysis, checks).splitlines())]
    return "\n".join([*lines, "## How it was made", "", *code, ""])


def couples_csv(analysis: StudyAnalysis) -> str:
    """A row for each two models, with all raters and with those kept, and by category."""
    ends = ("estimate", "low", "high")
    header = ["raters", "first", "second", "category", "wins", "ties", "losses"]
    header += [f"{name}_{end}" for name in ("win_rate", "share_of_answers") for end in ends]
    rows = []
    for name, result in (("kept", analysis.kept), ("everyone", analysis.everyone)):
        for couple in (*result.couples, *result.categories):
            intervals = [getattr(i, end) for i in (couple.win_rate, couple.share_of_answers) for end in ends]
            counts = [couple.wins, couple.ties, couple.losses]
            texts = [couple.first, couple.second, couple.category or ""]
            rows.append([name, *texts, *counts, *intervals, couple.p_value, couple.corrected_p_value])
    return csv_text([*header, "p_value", "corrected_p_value"], rows)


def pairs_csv(result: Result) -> str:
    """A row for each pair that was judged: its answers, the label of every group, and the final one."""
    groups = sorted({group for vote in result.votes for group in vote.group_labels})
    header = ["pair_id", "prompt_id", "category", "first", "second", "answers_first", "answers_second", "answers_tie"]
    rows = [
        [
            *[
                getattr(vote.pair, name)
                for name in ("pair_id", "prompt_id", "category", "first_model", "second_model")
            ],
            *[vote.counts[label] for label in (FIRST, SECOND, TIE)],
            *[vote.group_labels.get(group, "") for group in groups],
            vote.label,
            vote.pair.prompt,
        ]
        for vote in result.votes
    ]
    return csv_text([*header, *[f"group_{group}" for group in groups], "final", "prompt"], rows)


def raters_csv(analysis: StudyAnalysis) -> str:
    """A row for each rater: counts, times, and why they are discarded."""
    names = ["num_tasks", "num_answered", "num_left", "num_right", "num_ties", "side_p_value", "gold_right"]
    names += ["gold_total", "reversed", "mirrored", "median_seconds", "total_seconds"]
    rows = [
        [c.rater.name, c.rater.group, *[getattr(c, name) for name in names], "; ".join(c.reasons)]
        for c in analysis.checks
    ]
    return csv_text(["rater", "group", *names, "discarded"], rows)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV of texts and numbers; what a spreadsheet would take for a formula is quoted by an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([plain_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return buffer.getvalue()
