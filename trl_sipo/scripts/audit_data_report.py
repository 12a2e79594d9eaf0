# SPDX-License-Identifier: Apache-2.0
"""What `trl-sipo audit data` found, as numbers for JSON, as tables and as a figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_sipo.data.checking.check import DataCheck
    from trl_sipo.evaluation.label_agreement import Agreement
    from trl_sipo.evaluation.shortcuts import Shortcut
    from trl_sipo.evaluation.statistics import Interval
    from trl_sipo.reporting.evaluation_tables import Table

_ASSUMPTION = (
    "The share of turned labels is that of raters who err independently of one another. Rewards that were trained on "
    "the same judgements, or see the same things, make labels look noisier than they are; rewards that share the "
    "labels' errors make them look cleaner."
)
_EXACT = (
    "Repeats, and what is shared with held-out pairs, are found to the bit: a picture that was resaved is another one."
)


def report_of(
    evidence: Any, found: "DataCheck | None", shortcuts: Sequence["Shortcut"], implicit: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All numbers, with the verdict and the advice."""
    from trl_sipo.data.checking.noise import CANNOT_KNOW, NOISY
    from trl_sipo.evaluation.data_findings import by_severity, noise_finding, reward_findings, verdict
    from trl_sipo.evaluation.label_agreement import LABEL, advise, agreements, near_tie_share, turned_labels

    rewards = [name for name in evidence.votes if name not in (LABEL, "the model")]
    pairs = agreements(evidence.votes, evidence.prompts) if len(evidence.rows) else []
    near_ties = {name: near_tie_share(evidence.votes[name]) for name in rewards}
    of_rewards = {name: evidence.votes[name] for name in (LABEL, *rewards) if name in evidence.votes}
    turned = {**_of_repeats(found), **turned_labels(of_rewards, evidence.prompts)}
    by_label = [pair for pair in pairs if "the model" not in (pair.first, pair.second)]
    findings = [*evidence.findings, _no_pairs(evidence), *reward_findings(by_label, near_ties)]
    findings.append(noise_finding(turned, NOISY))
    ordered = by_severity(findings)
    return {
        "verdict": verdict(ordered),
        "findings": [finding.as_numbers() for finding in ordered],
        "advice": advise(turned, _easiest(shortcuts, pairs)).as_numbers(),
        "turned_labels": turned,
        "num_pairs": len(evidence.rows),
        "shortcuts": [_shortcut(shortcut) for shortcut in shortcuts],
        "agreements": [_agreement(pair) for pair in pairs],
        "near_ties": near_ties,
        "implicit": None if implicit is None else {name: implicit[name] for name in implicit if name != "settings"},
        "rows": None if found is None else found.report,
        "cannot_know": [_EXACT, *([_ASSUMPTION] if turned else []), *([CANNOT_KNOW] if _of_repeats(found) else [])],
    }


def _of_repeats(found: "DataCheck | None") -> dict[str, dict[str, float]]:
    """The share of turned labels by repeated judgements and cyclic triples, where there are enough of them."""
    from trl_sipo.data.checking.noise import FEW

    noise = {} if found is None else found.report["label_noise"]
    names = {"repeated judgements": ("agreement_of_repeats", "flips_from_repeats")}
    names["cyclic triples"] = ("cyclic_triples", "flips_from_triples")
    return {
        name: {
            "estimate": noise[flips]["value"],
            "low": noise[flips]["low"],
            "high": noise[flips]["high"],
            "num_pairs": noise[counted]["total"],
        }
        for name, (counted, flips) in names.items()
        if noise.get(counted) is not None and noise[counted]["total"] >= FEW
    }


def _no_pairs(evidence: Any) -> Any:
    from trl_sipo.evaluation.data_findings import STOP, Finding

    if len(evidence.rows):
        return None
    return Finding("no pairs", STOP, "No row prefers one of two different samples.", "Look at the labels.", 0, None)


def _easiest(shortcuts: Sequence["Shortcut"], pairs: Sequence["Agreement"]) -> "Interval | None":
    """What gets most pairs right without knowing anything of preferences."""
    found = [shortcut.area for shortcut in shortcuts]
    found += [
        pair.agreeing for pair in pairs if pair.second == "the model" and pair.first == "label" and pair.agreeing
    ]
    return max(found, key=lambda interval: interval.low, default=None)


def _shortcut(shortcut: "Shortcut") -> dict[str, Any]:
    from trl_sipo.evaluation.policy_distance import as_numbers

    return {
        "name": shortcut.name,
        "area": as_numbers(shortcut.area),
        "num_pairs": shortcut.num_pairs,
        "num_differing": shortcut.num_differing,
        "chosen_has_more": shortcut.wins,
    }


def _agreement(pair: "Agreement") -> dict[str, Any]:
    from trl_sipo.evaluation.policy_distance import as_numbers

    return {
        "first": pair.first,
        "second": pair.second,
        "conflict": None if pair.conflict is None else as_numbers(pair.conflict),
        "num_pairs": pair.num_pairs,
    }


# ------------------------------------------------------------------------------------------------------------ tables


def tables_of(report: Mapping[str, Any]) -> list["Table"]:
    """The report as tables of text; those without rows are left out."""
    tables = [
        _findings_table(report["findings"]),
        _shortcut_table(report["shortcuts"]),
        _agreement_table(report["agreements"], report["near_ties"]),
        _turned_table(report["turned_labels"]),
        _level_table((report["implicit"] or {}).get("levels", [])),
    ]
    return [table for table in tables if table.rows]


def _findings_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    from trl_sipo.reporting.evaluation_tables import Table

    cells = [
        [row["name"], row["severity"], "-" if row["count"] is None else f"{row['count']} of {row['total']}"]
        for row in rows
    ]
    return Table("Findings", "", ("what", "severity", "count"), cells)


def _shortcut_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    from trl_sipo.reporting.evaluation_tables import Table, with_interval

    cells = [
        [row["name"], with_interval(row["area"], percent=True), str(row["num_differing"]), str(row["chosen_has_more"])]
        for row in rows
    ]
    note = "Share of pairs whose chosen sample has more, ties one half; 50 % is chance. The intervals hold together."
    return Table(
        "What tells the arms apart", note, ("property", "chosen has more", "pairs that differ", "of these"), cells
    )


def _agreement_table(rows: Sequence[Mapping[str, Any]], near_ties: Mapping[str, float | None]) -> "Table":
    from trl_sipo.reporting.evaluation_tables import Table, with_interval

    cells = []
    for row in rows:
        ties = [near_ties.get(row[side]) for side in ("first", "second")]
        shown = " / ".join("-" if share is None else f"{share:.0%}" for share in ties)
        conflict = "-" if row["conflict"] is None else with_interval(row["conflict"], percent=True)
        cells.append([f"{row['first']} and {row['second']}", conflict, str(row["num_pairs"]), shown])
    note = "Conflict: the two prefer different arms, of the pairs that both tell apart. Near-ties: of each of the two."
    return Table("Who agrees with whom", note, ("raters", "conflict", "pairs", "near-ties"), cells)


def _turned_table(rows: Mapping[str, Mapping[str, float]]) -> "Table":
    from trl_sipo.reporting.evaluation_tables import Table, with_interval

    cells = [[name, with_interval(row, percent=True), str(row["num_pairs"])] for name, row in rows.items()]
    return Table("Labels that look turned", _ASSUMPTION, ("by", "share", "pairs"), cells)


def _level_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    from trl_sipo.reporting.evaluation_tables import Table, with_interval

    unit = "timestep" if rows and "timestep" in rows[0] else "sigma"
    cells = [
        [
            f"{row['time']:.3f}",
            f"{row[unit]:d}" if unit == "timestep" else f"{row[unit]:.4f}",
            with_interval(row["agreement"], percent=True),
        ]
        for row in rows
    ]
    note = (
        "Share of pairs whose chosen sample has the lower error. 50 %: at this level the model has no opinion. That "
        "is no fault of the labels; training is there to teach it one."
    )
    return Table("What the model prefers as it is", note, ("time", unit, "chosen is likelier"), cells)


def figures_of(report: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Shortcuts, and the model's own preference by noise level; none where there is nothing to draw."""
    from trl_sipo.reporting.audit_figures import data_figure

    levels = (report["implicit"] or {}).get("levels", [])
    if not report["shortcuts"] and not levels:
        return {}
    of_model = ", and right how often the model finds it likelier, by noise level" if levels else ""
    caption = f"How often the chosen sample has more of a property{of_model}. The line is chance."
    unit = "timestep" if levels and "timestep" in levels[0] else "sigma"
    figure = data_figure(
        {row["name"]: row["area"] for row in report["shortcuts"]},
        [row[unit] for row in levels],
        [row["agreement"] for row in levels],
        level_label=f"{unit} (0 is clean)",
    )
    return {"data": (figure, caption)}
