# SPDX-License-Identifier: Apache-2.0
"""The report of an online run: quality and importance weights over rounds, as Markdown, as a page and as figures."""

import json
from collections.abc import Mapping
from typing import Any

from trl_sipo.reporting.evaluation_tables import Table, markdown_table, number, with_interval
from trl_sipo.reporting.figures import Series, quality_figure
from trl_sipo.reporting.page import Page

Report = Mapping[str, Any]
"""`online.json`."""

_WEIGHTS = {
    "mean": ("Mean importance weight", "Of the pairs of each round (columns) under the policies (rows); at most 1."),
    "masked_share": ("Masked share", "Of the same weights: how many lie below the mask threshold."),
    "effective_share": ("Effective sample size", "sum(w)^2 / sum(w^2), per weight: 1 where all weigh the same."),
}


def tables(report: Report) -> list[Table]:
    """All tables that a report has something for."""
    found = [_rounds(report), *_evaluation(report)]
    return found + [_matrix(report, name) for name in _WEIGHTS] + [_weights_by_time(report)]


def _rounds(report: Report) -> Table:
    rewards = list(report["rounds"][0]["rewards"])
    rows = [
        (
            str(part["round"]),
            str(part["samples"]),
            str(part["pairs"]),
            str(part["replayed"]),
            *(number(part["rewards"][name]) for name in rewards),
            *(number(part["log"][-1].get(name)) if part["log"] else "-" for name in ("loss", "sipo/masked_fraction")),
        )
        for part in report["rounds"]
    ]
    header = (
        "round",
        "samples",
        "pairs",
        "replayed",
        *(f"{name} of its samples" for name in rewards),
        "loss",
        "masked",
    )
    note = (
        "The samples of a round are of the policy at its start, with prompts of training. Loss and masked share are "
        "the last that were logged in the round."
    )
    return Table("Rounds", note, header, rows)


def _evaluation(report: Report) -> list[Table]:
    if "evaluation" not in report["rounds"][0]:
        return []
    rows = [("base", row["metric"], with_interval(row["mean"]), "-", "-") for row in _metrics(report, 0, "base")]
    for place, part in enumerate(report["rounds"]):
        rows += [
            (
                str(part["round"]),
                row["metric"],
                with_interval(row["mean"]),
                with_interval(row["against_base"]["win_rate"], percent=True),
                with_interval(row["against_base"]["difference"]),
            )
            for row in _metrics(report, place, "policy")
        ]
    note = (
        "After each round, on prompts of the evaluation and the same noise as the base; intervals treat the prompt as "
        "the trial. Where a reward that ranked rises and the others fall, it is being hacked."
    )
    found = [Table("Evaluation", note, ("after round", "reward", "mean", "win rate", "difference"), rows)]
    variety = [(str(part["round"]), part["evaluation"]["variety"]) for part in report["rounds"]]
    names = ("relative_spread", "drift")
    lines = [(place, *(with_interval(row[name]) for name in names)) for place, row in variety if row]
    if lines:
        note = "Spread of the samples of a prompt, beside the base's; drift: how far a sample moved from the base's."
        found.append(Table("Variety and drift", note, ("after round", "spread", "drift"), lines))
    return found


def _metrics(report: Report, place: int, model: str) -> list[Mapping[str, Any]]:
    return [row for row in report["rounds"][place]["evaluation"]["metrics"] if row["model"] == model]


def _matrix(report: Report, name: str) -> Table:
    title, note = _WEIGHTS[name]
    known = {(entry["policy"], entry["data"]): entry[name] for entry in report["weights"]}
    count = len(report["rounds"])
    rows = [
        (f"after {policy} rounds", *(number(known.get((policy, data))) for data in range(count)))
        for policy in range(count + 1)
    ]
    return Table(title, note, ("policy", *(f"round {data}" for data in range(count))), rows)


def _weights_by_time(report: Report) -> Table:
    final = [entry for entry in report["weights"] if entry["policy"] == len(report["rounds"])]
    rows = [
        (f"{time:.2f}", *(number(entry["mean_by_time"][place]) for entry in final))
        for place, time in enumerate(final[0]["times"])
    ]
    note = "Mean importance weight of the final policy on the pairs of each round; time 0 is clean, 1 pure noise."
    return Table("Weights by noise level", note, ("time", *(f"round {entry['data']}" for entry in final)), rows)


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = [f"# {_title(report)}", ""]
    for table in tables(report):
        lines += markdown_table(table)
    settings = json.dumps(report["config"], indent=1)
    return "\n".join([*lines, "## How it was made", "", f"`{report['command']}`", "", "```json", settings, "```", ""])


def page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The report as HTML, with its figures."""
    made = Page(_title(report))
    captions = {"evaluation": "Rewards of the policy over rounds.", "weights": "Importance weights over rounds."}
    for name, picture in pictures.items():
        made.figure(picture, captions[name], captions[name])
    for table in tables(report):
        made.heading(table.title)
        made.paragraph(table.note, "note")
        made.table(table.header, table.rows)
    made.heading("How it was made")
    made.code(report["command"])
    made.code(json.dumps({"config": report["config"], "versions": report["versions"]}, indent=1))
    return made.render()


def figures(report: Report) -> dict[str, Any]:
    """Name -> figure: rewards over rounds, where they were measured, and importance weights of each round's pairs."""
    found = {}
    count = len(report["rounds"])
    if "evaluation" in report["rounds"][0]:
        panels: dict[str, list[Series]] = {}
        for row in _metrics(report, 0, "base"):
            name = row["metric"]
            means = [row, *(_of(_metrics(report, place, "policy"), name) for place in range(count))]
            values = [mean["mean"]["estimate"] for mean in means]
            panels[name] = [Series("policy", list(range(count + 1)), [values])]
        found["evaluation"] = quality_figure(panels, x_label="rounds of training")
    panels = {
        title: [
            Series(f"pairs of round {data}", [entry["policy"] for entry in entries], [[e[name] for e in entries]])
            for data in range(count)
            if (entries := [entry for entry in report["weights"] if entry["data"] == data])
        ]
        for name, (title, _) in _WEIGHTS.items()
    }
    found["weights"] = quality_figure(panels, x_label="rounds of training")
    return found


def _of(rows: list[Mapping[str, Any]], metric: str) -> Mapping[str, Any]:
    return next(row for row in rows if row["metric"] == metric)


def _title(report: Report) -> str:
    config = report["config"]
    return f"{len(report['rounds'])} rounds of {config['method']} on {config['model']}"
