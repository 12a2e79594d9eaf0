# SPDX-License-Identifier: Apache-2.0
"""The demo's figures and its report page."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from trl_sipo.adapters import adapter_for
from trl_sipo.demo.arm import DemoFiles, weight_curve
from trl_sipo.demo.medium import Medium
from trl_sipo.demo.settings import find_arm
from trl_sipo.demo.summary import beta_of
from trl_sipo.reporting.figures import (
    Series,
    importance_weight_figure,
    quality_figure,
    reward_figure,
    sample_grid,
)
from trl_sipo.reporting.page import Page, png_bytes

MASK_THRESHOLD = 0.9
# The grid that reproduces Fig. 4 of the SIPO paper on Stable Diffusion 1.5.
PAPER_STEPS = 50


Runs = list[dict[str, Any]]


def write_report(summary: dict[str, Any], parts: dict[str, Runs], files: DemoFiles, medium: Medium) -> Path:
    """Write `figures/*.png` and `report.html`; returns the report's path.

    Args:
        summary: As in `summary.json`.
        parts: The results of each source's runs.
    """
    figures = {source: _figures(summary, runs, files, medium) for source, runs in parts.items()}
    folder = files.root / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for source, drawn in figures.items():
        for name, png in drawn.items():
            (folder / f"{source}_{name}.png").write_bytes(png)
    path = files.root / "report.html"
    path.write_text(_page(summary, figures, medium).render())
    return path


def _figures(summary: dict[str, Any], runs: Runs, files: DemoFiles, medium: Medium) -> dict[str, bytes]:
    curves = importance_weight_figure(
        medium.curve_levels,
        _curves(summary, runs, files, medium),
        MASK_THRESHOLD,
        title=f"Importance weight w(t) on held-out {medium.noun}",
        level_label=medium.level_label,
    )
    rewards = _reward_panels(runs)
    return {
        "samples": png_bytes(_samples(summary, runs, files, medium)),
        "quality": png_bytes(quality_figure(_quality_panels(runs, medium))),
        **({"rewards": png_bytes(reward_figure(rewards))} if rewards else {}),
        "importance_weight": png_bytes(curves),
    }


def _by_arm(results: Runs) -> dict[str, list[dict[str, Any]]]:
    return {
        arm: [result for result in results if result["arm"] == arm]
        for arm in dict.fromkeys(result["arm"] for result in results)
    }


def _series(label: str, runs: list[dict[str, Any]], name: str) -> Series:
    steps = [record["step"] for record in runs[0]["records"]]
    # NaN draws nothing, and leaves the other lines their colours.
    return Series(label, steps, [[record.get(name, math.nan) for record in run["records"]] for run in runs])


def _curves(summary: dict[str, Any], results: Runs, files: DemoFiles, medium: Medium) -> dict[str, list[float]]:
    source, num_steps = results[0]["source"], summary["settings"]["importance_steps"]
    adapter = adapter_for(medium.load_pipeline(files.base_pipeline))
    curves = {
        f"base model, {steps} steps": weight_curve(adapter, source, steps, files, medium)
        for steps in (PAPER_STEPS, num_steps)
    }
    for arm, runs in _by_arm(results).items():
        columns = zip(*(run["weight_curve"] for run in runs), strict=True)
        curves[f"{find_arm(arm).label}, end"] = [sum(column) / len(runs) for column in columns]
    return curves


def _reward_panels(results: Runs) -> dict[str, tuple[Series, Series]]:
    return {
        find_arm(arm).label: (
            _series("chosen", runs, "held_out_chosen"),
            _series("rejected", runs, "held_out_rejected"),
        )
        for arm, runs in _by_arm(results).items()
        if "held_out_chosen" in runs[0]["records"][0]
    }


def _quality_panels(results: Runs, medium: Medium) -> dict[str, list[Series]]:
    # Measures drawn over the steps: field of a record -> panel title.
    panels = {
        "accuracy": f"Accuracy ({medium.wanted})",
        "second_accuracy": "Accuracy by the second verifier",
        "frechet_distance": "Frechet distance (lower is better)",
        "diversity": "Diversity within a class",
        "held_out_accuracies": "Held-out implicit accuracy",
        "masked_share": "Masked share of training pairs",
    }
    arms = _by_arm(results)
    return {
        title: [_series(find_arm(arm).label, runs, name) for arm, runs in arms.items()]
        for name, title in panels.items()
    }


def _samples(summary: dict[str, Any], runs: Runs, files: DemoFiles, medium: Medium) -> Image.Image:
    """The same prompts and starting noise for the base and each method's first seed."""
    firsts = {arm: first for arm, (first, *_) in _by_arm(runs).items()}
    folders = {
        find_arm(arm).label: files.run_directory(first["source"], arm, first["seed"]) for arm, first in firsts.items()
    }
    return sample_sheet(folders, summary["settings"]["samples_per_prompt"], files, medium)


def sample_sheet(
    folders: Mapping[str, Path], samples_per_prompt: int, files: DemoFiles, medium: Medium
) -> Image.Image:
    """Samples of the base and of runs side by side, the same prompts and starting noise in each row.

    Args:
        folders: Column title -> folder of a run.
        samples_per_prompt: Of a measurement.
    """
    prompts, rows = medium.all_prompts(), medium.sheet_rows()
    chosen = [row * samples_per_prompt for row in rows]
    columns = {"base": _pictures(files.base_images, chosen, medium)}
    for title, folder in folders.items():
        columns[title] = _pictures(folder / "images.safetensors", chosen, medium)
    return sample_grid(columns, [prompts[row].text for row in rows])


def _pictures(path: Path, indices: list[int], medium: Medium) -> list[Image.Image]:
    samples = load_file(path)["images"]
    return [medium.picture(samples[index]) for index in indices]


def _page(summary: dict[str, Any], figures: dict[str, dict[str, bytes]], medium: Medium) -> Page:
    page = Page(medium.title)
    page.paragraph(medium.introduction)
    for sentence in summary["verdict"]["base"]:
        page.paragraph(sentence, "verdict")
    for source, drawn in figures.items():
        _add_part(page, summary, source, drawn, medium)
    page.heading("Protocol")
    page.paragraph(medium.measures)
    page.paragraph(_protocol(summary["settings"]))
    page.code(json.dumps({"command": summary["command"], **summary["environment"], **summary["settings"]}, indent=1))
    return page


def _add_part(page: Page, summary: dict[str, Any], source: str, figures: dict[str, bytes], medium: Medium) -> None:
    """One comparison: sentences, table, pictures."""
    page.heading(f"{source.replace('_', '-').capitalize()}: {medium.sources[source]}")
    for sentence in summary["verdict"][source]:
        page.paragraph(sentence, "verdict")
    page.table(*table(summary, source, medium))
    page.figure(
        figures["samples"],
        medium.sheet_caption,
        f"Grid of generated {medium.noun}, one column per model",
    )
    page.figure(
        figures["quality"],
        "Mean over seeds; the band spans smallest to largest. Accuracy alone can certify a broken model: read it with "
        "the Frechet distance and the diversity. The masked share is that of the training pairs since the last "
        "measurement.",
        "Line charts of accuracy, Frechet distance, diversity, implicit accuracy and masked share over steps",
    )
    if "rewards" in figures:
        page.figure(
            figures["rewards"],
            "Rewards on held-out pairs: beta * (reference error - policy error) / 2. The margin can grow while both "
            f"fall: the model then prefers the chosen {medium.noun.removesuffix('s')} only by getting worse at the "
            "rejected one faster.",
            "Line charts of chosen and rejected reward over steps, one panel per method",
        )
    page.figure(
        figures["importance_weight"],
        f"w(t) on a grid of {summary['settings']['importance_steps']} steps, that of the sampler; for the base also "
        f"on the paper's grid of {PAPER_STEPS} (its Fig. 4). Below {MASK_THRESHOLD} a pair is masked by SIPO and "
        "DPO-C&M. As the policy moves away, its error grows, w falls and the masked region widens: the mask is a "
        "brake.",
        "Line chart of the importance weight against the timestep",
    )


def _protocol(settings: dict[str, Any]) -> str:
    return (
        f"At most {settings['num_pairs']} training pairs, and {settings['num_held_out']} held-out ones on prompts "
        "that training does not see, ranked by the primary verifier. All weights of the denoiser are trained with "
        f"AdamW at {settings['learning_rate']:g}, {settings['batch_size']} pairs a step, {settings['max_steps']} "
        f"steps. beta is in the Diffusion-DPO convention; {settings['beta']:g} is {settings['beta'] / 1000:g} in the "
        "SIPO paper's tables. Learning rate, length, grid and both betas were chosen in exploratory sweeps, so this "
        "run is a demonstration and no independent test."
    )


def table(summary: dict[str, Any], source: str, medium: Medium) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one comparison."""
    accuracies = ("accuracy", *(f"{name}_accuracy" for name in medium.attributes), "second_accuracy")
    header = ["method", "beta", "accuracy", *medium.attributes, "second verifier"]
    header += ["Frechet", "diversity", "implicit accuracy", "masked"]
    base = summary["base"]
    base_cells = [f"{base[name]:.0%}" for name in accuracies]
    rows = [["base model", "", *base_cells, f"{base['frechet_distance']:.0f}", f"{base['diversity']:.2f}", "", ""]]
    for arm, method in summary["parts"][source]["methods"].items():
        final = method["final"]
        beta = beta_of(arm, summary["settings"])
        rows.append(
            [
                method["label"],
                "" if beta is None else f"{beta:g}",
                *(percent(final[name]) for name in accuracies),
                number(final["frechet_distance"], 0),
                number(final["diversity"], 2),
                percent(final.get("held_out_accuracies")),
                percent(final["masked_share"]),
            ]
        )
    return header, rows


def percent(values: dict[str, Any] | None) -> str:
    """Mean, and smallest and largest of several seeds, of a share; empty where it was not measured."""
    return _with_bounds(values, ".0%")


def number(values: dict[str, Any] | None, digits: int) -> str:
    """The same of a number."""
    return _with_bounds(values, f".{digits}f")


def _with_bounds(values: dict[str, Any] | None, form: str) -> str:
    if values is None:
        return ""
    bounds = f" [{values['min']:{form}}, {values['max']:{form}}]" if len(values["values"]) > 1 else ""
    return f"{values['mean']:{form}}{bounds}"
