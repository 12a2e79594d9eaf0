# SPDX-License-Identifier: Apache-2.0
"""From the runs of all methods to rows and sentences. The sentences are computed from the rows."""

from collections.abc import Callable, Sequence
from typing import Any

from trl_sipo.demo.medium import Medium
from trl_sipo.demo.settings import STRENGTH_MARK, find_arm
from trl_sipo.demo.summary import aggregate, compare, order, spread, verdict
from trl_sipo.trainer.methods import method_classes

Row = dict[str, Any]

# Judged by its accuracy and by its distance from real media: which way is better, and how it is written.
_BETTER = {"accuracy": 1, "frechet_distance": -1}
_FORMS = {"accuracy": ".0%", "frechet_distance": ".0f"}


def method_row(runs: Sequence[dict[str, Any]], base: dict[str, Any], medium: Medium) -> Row:
    """What one method did at one strength, over seeds: its measures, and what it cost.

    Args:
        runs: Results of one arm, see `run_arm`.
        base: Measures of the base model.
    """
    (arm,) = {run["arm"] for run in runs}
    key, _, strength = arm.partition(STRENGTH_MARK)
    config_class = method_classes(find_arm(key).method)[0]
    images = 1 if config_class.arms == "chosen" else 2
    return {
        **aggregate(list(runs), base, medium)[arm],
        "label": find_arm(key).label,
        "strength": strength,
        # Passes of the denoiser, forward, for each pair of a batch: of the policy, and of the reference.
        "policy_passes": images,
        "reference_passes": images if config_class.has_reference else 0,
        "step_seconds": spread([run["step_seconds"] for run in runs]),
    }


def baselines_verdict(summary: dict[str, Any], medium: Medium) -> dict[str, list[str]]:
    """What was measured: of the base, of the methods on each source's data, and across them."""
    base, rows = summary["base"], summary["rows"]
    parts = {}
    for source in dict.fromkeys(row["source"] for row in rows):
        of_source = [row for row in rows if row["source"] == source]
        best = [row for row in of_source if row["is_best"]]
        parts[source] = [
            *against_base(best, base, "accuracy", ("More accurate", "less accurate")),
            *against_base(best, base, "frechet_distance", ("Closer to real media", "farther")),
            *leader(best),
            *sweep_sentences(of_source),
            *collapses(of_source),
            *verifier_gap(best),
        ]
    base_sentences = verdict({**summary, "parts": {}}, medium)["base"]
    return {"base": base_sentences, **parts, "across": across(rows)}


def against_base(rows: Sequence[Row], base: dict[str, Any], measure: str, words: tuple[str, str]) -> list[str]:
    """Which methods, at the chosen strength, are better and worse than the base with every seed."""
    value = {"min": base[measure], "max": base[measure]}
    sides = {side: _labels(rows, lambda row, s=side: order(row["final"][measure], value) == s) for side in (1, -1, 0)}
    better = _BETTER[measure]
    return [
        f"{words[0]} than the base ({base[measure]:{_FORMS[measure]}}) with every seed, at the chosen strength: "
        f"{sides[better]}; {words[1]} with every seed: {sides[-better]}; neither: {sides[0]}."
    ]


def leader(rows: Sequence[Row]) -> list[str]:
    """The highest mean accuracy and the lowest mean distance, and what cannot be told from them."""
    if len(rows) < 2:
        return []
    sentences = []
    for measure, title in (
        ("accuracy", "Highest mean accuracy"),
        ("frechet_distance", "Lowest mean Frechet distance"),
    ):
        first = max(rows, key=lambda row, m=measure: _BETTER[m] * row["final"][m]["mean"])
        near = _labels(
            rows, lambda row, f=first, m=measure: row is not f and order(row["final"][m], f["final"][m]) == 0
        )
        sentences.append(
            f"{title}: {first['label']} ({first['final'][measure]['mean']:{_FORMS[measure]}}); with seeds that "
            f"overlap its own: {near}."
        )
    return sentences


def sweep_sentences(rows: Sequence[Row]) -> list[str]:
    """What choosing a strength changed, and where the values tried may not have held the best."""
    swept = [row for row in rows if row["sweep"]]
    best = [row for row in swept if row["is_best"]]
    if not best:
        return []
    changed = [row for row in best if not row["is_default"]]
    defaults = {row["method"]: row for row in swept if row["is_default"]}
    gained = [
        row for row in changed if order(row["final"]["accuracy"], defaults[row["method"]]["final"]["accuracy"]) == 1
    ]
    at_an_end = [row for row in best if _is_at_an_end(row)]
    return [
        f"The sweep, on a seed of its own, left the default for {len(changed)} of {len(best)} methods; with every "
        f"seed more accurate by it: {_labels(gained)}.",
        f"Chosen at an end of the values tried, so that a better one may lie beyond: {_labels(at_an_end)}.",
    ]


def collapses(rows: Sequence[Row]) -> list[str]:
    """Which runs kept less than half of the base's accuracy."""
    collapsed = [row for row in rows if row["num_collapsed"]]
    if not collapsed:
        return ["No run of the table collapsed."]
    counts = ", ".join(f"{_named(row)} ({row['num_collapsed']} of {row['num_seeds']})" for row in collapsed)
    return [f"Runs that collapsed, below half of the base's accuracy: {counts}."]


def verifier_gap(rows: Sequence[Row]) -> list[str]:
    """Whether the verifier that no method was trained on sees what the primary one sees."""
    final = {row["label"]: row["final"] for row in rows}
    higher = [row for row in rows if order(row["final"]["accuracy"], row["final"]["second_accuracy"]) == 1]
    label = max(final, key=lambda name: final[name]["accuracy"]["mean"] - final[name]["second_accuracy"]["mean"])
    gap = final[label]["accuracy"]["mean"] - final[label]["second_accuracy"]["mean"]
    return [
        f"Accuracy by the primary verifier above that by the second, with all seeds of the one above all of the "
        f"other: {_labels(higher)}. The largest excess of the primary: {label}, {100 * gap:+.1f} points."
    ]


def across(rows: Sequence[Row]) -> list[str]:
    """Comparisons asked for before the runs: SIPO and SFT with Diffusion-DPO, and data of their own with pairs."""
    asked = (
        ("off_policy", "sipo", "off_policy", "dpo"),
        ("on_policy", "sipo", "on_policy", "dpo"),
        ("off_policy", "sft", "off_policy", "dpo"),
        ("trajectories", "d3po", "on_policy", "dpo"),
        ("self_play", "spin", "off_policy", "sft"),
    )
    best = {(row["source"], row["method"]): row for row in rows if row["is_best"]}
    return [
        compare(best[source, arm], best[other_source, other], *(_titled(best[key]) for key in keys))
        for source, arm, other_source, other in asked
        for keys in [((source, arm), (other_source, other))]
        if set(keys) <= set(best)
    ]


def _titled(row: Row) -> str:
    return f"{_named(row)} ({row['source'].replace('_', '-')})"


def _named(row: Row) -> str:
    return f"{row['label']} at {row['strength']}" if row["strength"] else row["label"]


def _is_at_an_end(row: Row) -> bool:
    tried = [float(value) for value in row["sweep"]]
    return float(row["strength"]) in (min(tried), max(tried))


def _labels(rows: Sequence[Row], wanted: Callable[[Row], bool] = lambda row: True) -> str:
    return ", ".join(row["label"] for row in rows if wanted(row)) or "none"
