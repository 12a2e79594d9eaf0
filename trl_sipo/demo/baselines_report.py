# SPDX-License-Identifier: Apache-2.0
"""The comparison of all methods as one table, with figures: a page, and Markdown."""

import json
import math
from collections.abc import Sequence
from typing import Any

from trl_sipo.demo.arm import DemoFiles
from trl_sipo.demo.baselines_summary import Row
from trl_sipo.demo.medium import Medium
from trl_sipo.demo.report import number, percent, sample_sheet
from trl_sipo.demo.settings import find_arm
from trl_sipo.reporting.figures import Point, Series, quality_figure, trade_off_figure
from trl_sipo.reporting.page import Page, png_bytes

HEADER = (
    "method",
    "data",
    "strength",
    "accuracy",
    "second verifier",
    "reward",
    "Frechet",
    "diversity",
    "implicit accuracy",
    "passes per pair",
    "CPU seconds",
)


def write_baselines_report(summary: dict[str, Any], files: DemoFiles, medium: Medium) -> None:
    """Write `figures/*.png`, `table.md` and `report.html`.

    Args:
        summary: As in `summary.json`.
        files: Where the runs are, whose samples are shown.
    """
    figures = _figures(summary, files, medium)
    folder = files.root / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in figures.items():
        (folder / f"{name}.png").write_bytes(png)
    (files.root / "table.md").write_text(markdown_table(HEADER, table_rows(summary)))
    (files.root / "report.html").write_text(_page(summary, figures, medium).render())


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The cells of the base, and of each method on its data at its default and at the chosen strength."""
    base = summary["base"]
    first = [
        "base model",
        "",
        "",
        *(f"{base[name]:.0%}" for name in ("accuracy", "second_accuracy")),
        f"{base['reward']:.2f}",
        f"{base['frechet_distance']:.0f}",
        f"{base['diversity']:.2f}",
        *[""] * 3,
    ]
    return [first, *(_cells(row) for row in summary["rows"])]


def _cells(row: Row) -> list[str]:
    final = row["final"]
    return [
        row["label"],
        row["source"].replace("_", "-"),
        f"{row['strength']} ({_role(row)})" if row["strength"] else "",
        percent(final["accuracy"]),
        percent(final["second_accuracy"]),
        number(final["reward"], 2),
        number(final["frechet_distance"], 0),
        number(final["diversity"], 2),
        percent(final.get("held_out_accuracies")),
        f"{row['policy_passes']} + {row['reference_passes']}",
        f"{row['step_seconds']['mean']:.1f}",
    ]


def _role(row: Row) -> str:
    roles = {"default": row["is_default"], "chosen": row["is_best"]}
    return " and ".join(name for name, has in roles.items() if has)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a README."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _figures(summary: dict[str, Any], files: DemoFiles, medium: Medium) -> dict[str, bytes]:
    figures = {
        "trade_off": png_bytes(trade_off_figure(_points(summary), ("Frechet distance", f"accuracy ({medium.wanted})")))
    }
    panels = _sweep_panels(summary["rows"])
    if panels:
        figures["sweep"] = png_bytes(
            quality_figure(panels, columns=2, x_label="strength, over the default", x_scale="log")
        )
    samples_per_prompt = summary["settings"]["settings"]["samples_per_prompt"]
    first_seed = summary["settings"]["seeds"][0]
    for source in summary["settings"]["arms"]:
        best = [row for row in summary["rows"] if row["source"] == source and row["is_best"]]
        folders = {row["label"]: files.run_directory(source, row["arm"], first_seed) for row in best}
        figures[f"{source}_samples"] = png_bytes(sample_sheet(folders, samples_per_prompt, files, medium))
    return figures


def _points(summary: dict[str, Any]) -> dict[str, list[Point]]:
    """Per source: the base, and each method at its default (hollow) and at the chosen strength.

    Methods with data of their own share a panel.
    """
    base = summary["base"]
    panels: dict[str, list[Point]] = {}
    for row in summary["rows"]:
        is_own = find_arm(row["method"]).source is not None
        title = "data of their own" if is_own else row["source"].replace("_", "-")
        points = panels.setdefault(title, [Point("base model", [base["frechet_distance"]], [base["accuracy"]])])
        distances, accuracies = (row["final"][name]["values"] for name in ("frechet_distance", "accuracy"))
        points.append(Point(row["label"], distances, accuracies, is_hollow=not row["is_best"]))
    return panels


def _sweep_panels(rows: Sequence[Row]) -> dict[str, list[Series]]:
    """Per source and measure one line per method, in every panel all of them, so that one legend serves."""
    swept = [row for row in rows if row["is_default"] and row["sweep"]]
    labels = dict.fromkeys(row["label"] for row in swept)
    panels = {}
    for source in dict.fromkeys(row["source"] for row in swept):
        of_source = {row["label"]: row for row in swept if row["source"] == source}
        for name, title in (("accuracy", "accuracy"), ("frechet_distance", "Frechet distance")):
            lines = [_sweep_line(label, of_source.get(label), name) for label in labels]
            panels[f"{source.replace('_', '-')}: {title}"] = lines
    return panels


def _sweep_line(label: str, row: Row | None, name: str) -> Series:
    if row is None:
        return Series(label, [1.0], [[math.nan]])  # draws nothing
    ratios = [float(value) / float(row["strength"]) for value in row["sweep"]]
    return Series(label, ratios, [[record[name] for record in row["sweep"].values()]])


def _page(summary: dict[str, Any], figures: dict[str, bytes], medium: Medium) -> Page:
    page = Page("Every method at one budget")
    page.paragraph(
        f"The same base model, the same pairs and the same noise per seed for every method, {_budget(summary)}. This "
        "page shows what was measured on this machine, and nothing else."
    )
    for sentence in (*summary["verdict"]["base"], *summary["verdict"]["across"]):
        page.paragraph(sentence, "verdict")
    page.table(HEADER, table_rows(summary))
    page.paragraph(legend(summary), "note")
    page.figure(
        figures["trade_off"],
        "Up and to the left is better. Filled: at the chosen strength; hollow: at the default. Bars: smallest and "
        "largest over seeds.",
        "Accuracy against Frechet distance, one point per method",
    )
    if "sweep" in figures:
        page.figure(
            figures["sweep"],
            f"What strengths were chosen from: one run each, with seed {summary['settings']['sweep_seed']}, which is "
            "not in the table. 1 is the method's default.",
            "Line charts of accuracy and Frechet distance against the strength",
        )
    for source in summary["settings"]["arms"]:
        page.heading(f"{source.replace('_', '-').capitalize()}: {medium.sources[source]}")
        for sentence in summary["verdict"][source]:
            page.paragraph(sentence, "verdict")
        page.figure(
            figures[f"{source}_samples"],
            f"{medium.sheet_caption} At the chosen strength.",
            f"Grid of generated {medium.noun}, one column per method",
        )
    page.heading("Protocol")
    page.paragraph(medium.measures)
    page.code(json.dumps({"command": summary["command"], **summary["environment"], **summary["settings"]}, indent=1))
    return page


def _budget(summary: dict[str, Any]) -> str:
    settings = summary["settings"]["settings"]
    pairs = ", ".join(f"{count} {source.replace('_', '-')}" for source, count in summary["num_train_pairs"].items())
    return (
        f"{settings['max_steps']} optimiser steps of {settings['batch_size']} pairs with AdamW at "
        f"{settings['learning_rate']:g} on all weights of the denoiser; training pairs: {pairs}"
    )


def legend(summary: dict[str, Any]) -> str:
    """How the table is to be read."""
    settings = summary["settings"]
    error = (summary["base"]["accuracy"] * (1 - summary["base"]["accuracy"]) / summary["num_samples"]) ** 0.5
    return (
        f"Mean over the training seeds {', '.join(map(str, settings['seeds']))}, smallest and largest in brackets. "
        f"All runs are measured on the same {summary['num_samples']} prompts and starting noises, so that the "
        f"standard error of one accuracy ({100 * error:.1f} points at the base's) is not in the brackets. Strength is "
        "the method's beta, which means another thing in each objective. The chosen one is the best of the values "
        f"tried on seed {settings['sweep_seed']}: of those within one standard error of the highest accuracy, that "
        "with the lowest Frechet distance. Passes: forward passes of the policy and of the reference for each pair of "
        "a batch; SFT sees the chosen arm alone, Diffusion-KTO both arms as samples of their own. CPU seconds: of all "
        "steps of the optimiser in a run, in one thread. Implicit accuracy: of the method's own reward, on held-out "
        "pairs of its own data; Diffusion-KTO's is over single samples, SFT has no reward. D3PO and SPIN-Diffusion "
        "learn from data of their own, so that they differ from the others in more than the objective."
    )
