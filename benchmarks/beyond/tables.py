# SPDX-License-Identifier: Apache-2.0
"""The results as tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from beyond.analysis import REFERENCES
from beyond.area import MEASURES, PRIMARY
from beyond.evidence import Evidence
from beyond.points import STOPPING, points_of
from beyond.robustness import REFERENCES as COMPARED
from beyond.robustness import SUBJECT

SHARED_SEEDS = (
    "Intervals and p-values over several cells take these as independent. Cells share the numbers of their seeds, and "
    'with these the order of pairs and the noise: rows named "at once" under Robustness resample seeds in all cells '
    "together. Of one or two seeds there is no interval; the area of one seed is not cross-fitted."
)
QUICK_NOTE = "Quick runs of a few steps: these numbers mean nothing."


def reported(methods: Iterable[str]) -> list[str]:
    """Those that are shown: the trained ones, and of those that are stopped early DPO; the JSON has all."""
    return [name for name in methods if name.startswith("DPO, ") or not name.endswith(tuple(STOPPING))]


def tables(result: Mapping[str, Any]) -> str:
    """All tables, each under its heading."""
    added = result["more_settings"]
    parts = {
        "Areas over the main cells": areas_table(result),
        **{f"Difference from {name}": differences_table(result, name) for name in REFERENCES},
        "Areas by cell": cells_table(result),
        "Collapsed runs": collapsed_table(result),
        "One setting for all cells, every run to its end": single_table(result, "at the end"),
        "One setting and one step for all cells": single_table(result, "at any step"),
        "Long runs": long_table(result),
        f"Robustness: area of {SUBJECT} minus that of others, defined otherwise": variants_table(result),
        "Robustness: the area of each setting alone": settings_table(result["robustness"]["settings"]),
        "Robustness: settings that differ in one thing": matched_table(result),
        "Robustness: what tuning measured, by one seed and with all settings": tuned_table(result),
        f"Settings added after the test: area of {SUBJECT} minus that of others": added_table(added),
        "Settings added after the test: the area of each alone": settings_table(added.get("alone", [])),
    }
    notes = [QUICK_NOTE] if result.get("is_quick") else []
    notes.append(SHARED_SEEDS)
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in parts.items() if table)
    if result["missing"]:
        notes.append(f"{len(result['missing'])} runs of the protocol are missing; they are named in `frontier.json`.")
    return "\n\n".join([*notes, text]) + "\n"


def areas_table(result: Mapping[str, Any]) -> str:
    """Methods by their cross-fitted area over the main cells, and what each base gives.

    Those that were made in fewer cells come last: their means are of other cells.
    """
    over = {quality: part["methods"] for quality, part in result["over_cells"].items()}
    rows = over[PRIMARY]
    bases = list(dict.fromkeys(base for row in rows.values() for base in row["by_base"]))
    head = ["method", "cells", "area", *(f"base {base}" for base in bases)]
    head += [f"area, {quality.replace('_', ' ')}" for quality in over if quality != PRIMARY]
    order = sorted(reported(rows), key=lambda method: (-rows[method]["cells"], -rows[method]["value"]))
    lines = []
    for method in order:
        row = rows[method]
        by_base = [interval(row["by_base"][base]) if base in row["by_base"] else "" for base in bases]
        others = [interval(over[quality][method]) for quality in over if quality != PRIMARY]
        lines.append([method, str(row["cells"]), interval(row), *by_base, *others])
    return markdown(head, lines) if lines else ""


def differences_table(result: Mapping[str, Any], reference: str) -> str:
    """Area of each method minus that of one, with the interval, and the Holm-corrected p-value."""
    rows = result["over_cells"][PRIMARY]["differences"][reference]
    bases = list(dict.fromkeys(base for row in rows.values() for base in row["by_base"]))
    lines = [
        [method, str(row["cells"]), interval(row, "+"), _p(row.get("p_holm"))]
        + [interval(row["by_base"][base], "+") if base in row["by_base"] else "" for base in bases]
        for method, row in sorted(rows.items(), key=lambda item: -item[1]["value"])
    ]
    return (
        markdown(["method", "cells", "difference", "p (Holm)", *(f"base {b}" for b in bases)], lines) if rows else ""
    )


def cells_table(result: Mapping[str, Any]) -> str:
    """Cross-fitted area of each method in each cell; in brackets the plain one."""
    cells = result["cells"]
    methods = reported(dict.fromkeys(method for cell in cells.values() for method in cell["methods"]))
    lines = []
    for method in methods:
        found = [
            cell["methods"][method]["area"][PRIMARY] if method in cell["methods"] else None for cell in cells.values()
        ]
        policies = max(cell["methods"][method]["policies"] for cell in cells.values() if method in cell["methods"])
        values = [f"{area['value']:.3f} ({area['plain']:.3f})" if area else "" for area in found]
        lines.append([method, str(policies), *values])
    return markdown(["method", "policies", *(name.replace("_", " ") for name in cells)], lines) if lines else ""


def collapsed_table(result: Mapping[str, Any]) -> str:
    """Runs of each setting and cell that had collapsed at their last step."""
    cells = result["cells"]
    names = dict.fromkeys(
        (method, setting)
        for cell in cells.values()
        for method, row in cell["methods"].items()
        for setting in row.get("collapsed", {})
    )
    lines = []
    for method, setting in names:
        found = [cell["methods"].get(method, {}).get("collapsed", {}).get(setting) for cell in cells.values()]
        total = [sum(part[name] for part in found if part) for name in ("count", "of")]
        shown = [f"{part['count']}/{part['of']}" if part else "" for part in found]
        lines.append([method, setting, f"{total[0]}/{total[1]}", *shown])
    head = ["method", "setting", "all", *(name.replace("_", " ") for name in cells)]
    return markdown(head, lines) if lines else ""


def single_table(result: Mapping[str, Any], when: str) -> str:
    """What one policy of each method gives over all cells of the test: the mean, and the worst cell."""
    rows = {method: row[when] for method, row in result["single"].items() if row[when]["cells"]}
    lines = []
    for method, row in sorted(rows.items(), key=lambda item: -item[1]["mean"]["area"]):
        shown = []
        for name in ("win_rate", "frechet_ratio", "diversity_ratio", "area"):
            form = "{:.0%}" if name == "win_rate" else "{:.2f}"
            shown.append(f"{form.format(row['mean'][name])} (worst {form.format(row['worst'][name])})")
        lines.append([method, row["setting"], str(row["step"]), str(len(row["cells"])), *shown])
    head = [
        "method",
        "setting",
        "step",
        "cells",
        "win rate",
        "Frechet distance / base's",
        "diversity / base's",
        "area",
    ]
    return markdown(head, lines) if lines else ""


def long_table(result: Mapping[str, Any]) -> str:
    """The long runs, measurement by measurement: means over seeds, smallest and largest in brackets."""
    forms = {"win_rate": "{:.0%}", "frechet_distance": "{:.1f}", "diversity": "{:.2f}"}
    lines = []
    for cell, arms in result["long"].items():
        for name, arm in arms.items():
            for position, step in enumerate(arm["steps"]):
                shown = [_spread([run[position] for run in arm[measure]], form) for measure, form in forms.items()]
                lines.append([cell, name, str(step), *shown])
    head = ["cell", "setting", "step", "win rate over the base", "Frechet distance", "diversity"]
    return markdown(head, lines) if lines else ""


def variants_table(result: Mapping[str, Any]) -> str:
    """The conclusion by other definitions, a row each; the first is that of the protocol."""
    lines = []
    for name, row in result["robustness"]["variants"].items():
        if row:
            cells = max(one["cells"] for one in row.values())
            shown = [interval(row[method], "+") if method in row else "" for method in COMPARED]
            lines.append([name, str(cells), *shown])
    return markdown(["definition", "cells", *COMPARED], lines) if lines else ""


def added_table(found: Mapping[str, Any]) -> str:
    """The subject as it was frozen against methods with more settings than the protocol gave them."""
    lines = []
    for reference, row in found.get("compared", {}).items():
        shown = [interval(row[name], "+") if row[name] else "" for name in ("as tested", "with more", "seeds at once")]
        counts = f"{row['settings'] - len(row['added'])} + {len(row['added'])}"
        lines.append([reference, counts, str(len(row["cells"])), str(row["seeds"]), *shown])
    head = ["method", "settings", "cells", "seeds", "as tested", "with the added", "seeds at once"]
    return markdown(head, lines) if lines else ""


def settings_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Settings as if each were its method's only one, over the main cells and those of each source."""
    sources = list(dict.fromkeys(source for row in rows for source in row["by_source"]))
    lines = [
        [row["method"], row["setting"], str(row["cells"]), interval(row)]
        + [interval(row["by_source"][source]) if source in row["by_source"] else "" for source in sources]
        for row in rows
    ]
    head = ["method", "setting", "cells", "area", *(source.replace("_", " ") for source in sources)]
    return markdown(head, lines) if lines else ""


def matched_table(result: Mapping[str, Any]) -> str:
    """Pairs of settings, cell by cell: both at their last step, and the second against the first."""
    lines = []
    for pair in result["robustness"]["matched"]:
        names = [", ".join(pair[side]) for side in ("without", "with")]
        for cell, row in pair["cells"].items():
            ends = [
                f"{row[side]['win_rate']:.0%}, {2 ** row[side]['log_frechet']:.2f}" for side in ("without", "with")
            ]
            lines.append([*names, cell.replace("_", " "), str(len(row["seeds"])), *ends, *_matched(row["difference"])])
        if pair["cells"]:
            lines.append([*names, f"mean of {len(pair['cells'])} cells", "", "", "", *_matched(pair["all"])])
    head = ["first", "second", "cell", "seeds", "first: win rate, Frechet / base's", "second"]
    return markdown([*head, "win rate, difference", "Frechet, ratio", "area, difference"], lines) if lines else ""


def _matched(found: Mapping[str, Any]) -> list[str]:
    ratio = {name: value if value is None else 2**value for name, value in found["log_frechet"].items()}
    return [interval(found["win_rate"], "+"), interval(ratio), interval(found["area"], "+")]


def tuned_table(result: Mapping[str, Any]) -> str:
    """How many settings were tried, and their area in the cells of tuning; chosen and measured on the same seed."""
    rows = result["robustness"]["tuning"]
    cells = list(dict.fromkeys(cell for row in rows.values() for cell in row["cells"]))
    lines = [
        [method, str(row["settings"])]
        + [f"{row['cells'][cell]:.3f}" if cell in row["cells"] else "" for cell in cells]
        for method, row in rows.items()
    ]
    return markdown(["method", "settings tried", *(cell.replace("_", " ") for cell in cells)], lines) if lines else ""


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} [{form.format(min(values))}, {form.format(max(values))}]"


def policies_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `selection.tuning_table`."""
    head = ["method", "cell", "setting", "step", "win rate", "Frechet", "second accuracy", "diversity", "frontier"]
    lines = [
        [row["method"], row["cell"], f"**{row['setting']}**" if row["is_tested"] else row["setting"], str(row["step"])]
        + [f"{row['win_rate']:.3f}", f"{row['frechet_distance']:.1f}"]
        + [f"{row['second_accuracy']:.3f}", f"{row['diversity']:.2f}", "yes" if row["on_frontier"] else ""]
        for row in rows
    ]
    return markdown(head, lines)


def headline_table(found: Evidence, reported: Evidence | None) -> str:
    """Each arm and step of the headline: means over its seeds, and in brackets those of the report's own runs."""
    lines = []
    kept = _means(reported, found) if reported else {}
    for (cell, method, setting, step), means in _means(found, found).items():
        shown = []
        for name, form in (("win_rate", "{:.1%}"), ("frechet_distance", "{:.1f}"), ("diversity", "{:.2f}")):
            before = kept.get((cell, method, setting, step))
            shown.append(form.format(means[name]) + (f" ({form.format(before[name])})" if before else ""))
        lines.append([cell, method, setting, str(step), *shown])
    head = ["cell", "method", "setting", "step", "win rate over the base", "Frechet distance", "diversity"]
    return markdown(head, lines)


def _means(found: Evidence, like: Evidence) -> dict[tuple[str, str, str, int], dict[str, float]]:
    """(cell, method, setting, step) -> means over the seeds that `like` has."""
    seeds = {record["run"]["seed"] for record in like.records}
    means = {}
    for cell, methods in found.by_cell(seeds).items():
        for method, rows in methods.items():
            points = points_of(rows)
            for policy, values in zip(points.policies, points.means, strict=True) if points else ():
                means[cell.name, method, *policy] = dict(zip(MEASURES, values.tolist(), strict=True))
    return means


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rule = "|" + "---|" * len(head)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def interval(row: Mapping[str, Any], sign: str = "") -> str:
    """A value with its interval, if it has one."""
    value = f"{row['value']:{sign}.3f}"
    return value if row["low"] is None else f"{value} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
