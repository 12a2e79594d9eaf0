# SPDX-License-Identifier: Apache-2.0
"""From the runs to the numbers and sentences of the report. The sentences are computed from the numbers."""

from statistics import mean
from typing import Any

from trl_sipo.demo.medium import Medium
from trl_sipo.demo.settings import STRENGTH_MARK, find_arm

# A method has collapsed when it keeps less than this share of the base's accuracy.
COLLAPSED_SHARE = 0.5


def measures(medium: Medium) -> tuple[str, ...]:
    """Fields of a record that are reported per method at the end of training; not every method has all of them."""
    return (
        "accuracy",
        *(f"{name}_accuracy" for name in medium.attributes),
        "second_accuracy",
        "reward",
        "frechet_distance",
        "diversity",
        "held_out_accuracies",
        "held_out_chosen",
        "held_out_rejected",
        "masked_share",
    )


def spread(values: list[float]) -> dict[str, float]:
    """Mean, smallest and largest value, and the values themselves."""
    return {"mean": mean(values), "min": min(values), "max": max(values), "values": values}


def aggregate(results: list[dict[str, Any]], base: dict[str, Any], medium: Medium) -> dict[str, Any]:
    """Per arm: each measure at the last step over seeds, the best accuracy on the way, and how many runs collapsed."""
    methods = {}
    for arm in dict.fromkeys(result["arm"] for result in results):
        runs = [result for result in results if result["arm"] == arm]
        last = [run["records"][-1] for run in runs]
        collapsed = [record["accuracy"] < COLLAPSED_SHARE * base["accuracy"] for record in last]
        methods[arm] = {
            "label": find_arm(arm).label,
            "num_seeds": len(runs),
            "final": {name: spread([record[name] for record in last]) for name in measures(medium) if name in last[0]},
            "best_accuracy": spread([max(record["accuracy"] for record in run["records"]) for run in runs]),
            "num_collapsed": sum(collapsed),
        }
    return methods


def records(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every run's measurements, for the summary."""
    return [
        {"method": find_arm(run["arm"]).label, "arm": run["arm"], "seed": run["seed"], "steps": run["records"]}
        for run in results
    ]


def verdict(summary: dict[str, Any], medium: Medium) -> dict[str, list[str]]:
    """What was measured, in sentences that hold for these numbers and no others: of the base, and of each part."""
    base = summary["base"]
    ceiling = summary["ceiling"]["primary"]
    attributes = ", ".join(f"{name} {ceiling['real'][name]:.0%}" for name in medium.attributes)
    base_sentences = [
        f"The base model draws what the prompt says in {base['accuracy']:.0%} of its {medium.noun} (Frechet distance "
        f"{base['frechet_distance']:.0f}, diversity {base['diversity']:.2f}).",
        f"Ceiling: the verifier finds {medium.wanted} in {ceiling['real'][medium.all_attributes]:.0%} of "
        f"{medium.real} ({attributes}), and in {ceiling['reconstructed'][medium.all_attributes]:.0%} of them after "
        f"the autoencoder. More than that means {medium.noun} that please the verifier.",
    ]
    parts = {source: part_verdict(part["methods"], summary["settings"]) for source, part in summary["parts"].items()}
    return {"base": base_sentences, **parts}


def part_verdict(methods: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The sentences of one comparison."""
    sentences = []
    for arm, method in methods.items():
        final = method["final"]
        sentences.append(
            f"{method['label']}{_at_beta(arm, settings)} ends at {final['accuracy']['mean']:.0%} "
            f"({_range(final['accuracy'])}), {_fate(method)}, with a Frechet distance of "
            f"{final['frechet_distance']['mean']:.0f} and a diversity of {final['diversity']['mean']:.2f}"
            + (f"; {final['masked_share']['mean']:.0%} of its last pairs were masked." if _masks(arm) else ".")
        )
    small, best = f"at beta {settings['beta']:g}", f"at beta {settings['best_beta']:g}"
    if {"dpo", "sipo"} <= set(methods):
        names = (f"SIPO {small}", "Diffusion-DPO at the same beta")
        sentences.append(compare(methods["sipo"], methods["dpo"], *names))
    if {"sipo", "dpo_best"} <= set(methods):
        names = (f"SIPO {small}", f"Diffusion-DPO {best}")
        sentences.append(compare(methods["sipo"], methods["dpo_best"], *names))
    return sentences


def beta_of(arm: str, settings: dict[str, Any]) -> float | None:
    """What an arm runs with: a strength of its own, or the demo's small or best beta; None: it has none."""
    found = find_arm(arm)
    if found.strength is None:
        return None
    return found.overrides.get(found.strength, settings["best_beta" if found.uses_best_beta else "beta"])


def _at_beta(arm: str, settings: dict[str, Any]) -> str:
    beta = beta_of(arm, settings)
    return "" if beta is None or STRENGTH_MARK in arm else f" (beta {beta:g})"


def _masks(arm: str) -> bool:
    found = find_arm(arm)
    return found.method == "sipo" and found.overrides.get("mask", True)


def _range(values: dict[str, Any]) -> str:
    if len(values["values"]) == 1:
        return "one seed"
    return f"{values['min']:.0%} to {values['max']:.0%} over {len(values['values'])} seeds"


def _fate(method: dict[str, Any]) -> str:
    collapsed, seeds = method["num_collapsed"], method["num_seeds"]
    if collapsed == 0:
        return "no run collapsed"
    return "every run collapsed" if collapsed == seeds else f"{collapsed} of {seeds} runs collapsed"


def order(values: dict[str, Any], others: dict[str, Any]) -> int:
    """1 if every seed of `values` is above every seed of `others`, -1 if below, 0 if they overlap."""
    if values["min"] > others["max"]:
        return 1
    return -1 if values["max"] < others["min"] else 0


def compare(method: dict[str, Any], other: dict[str, Any], name: str, other_name: str) -> str:
    """`method` against `other` in accuracy, Frechet distance and diversity: only what every seed shows is claimed."""
    final, others = method["final"], other["final"]
    words = {
        "accuracy": {1: "higher", -1: "lower"},
        "frechet_distance": {1: "higher (worse)", -1: "lower (better)"},
        "diversity": {1: "higher", -1: "lower"},
    }
    clauses = []
    for measure, direction in words.items():
        digits = {"accuracy": ".0%", "frechet_distance": ".0f", "diversity": ".2f"}[measure]
        claim = direction.get(order(final[measure], others[measure]), "not clearly different")
        numbers = f"{final[measure]['mean']:{digits}} against {others[measure]['mean']:{digits}}"
        clauses.append(f"{measure.replace('_', ' ').capitalize()} {claim} ({numbers})")
    num_seeds = min(method["num_seeds"], other["num_seeds"])
    basis = "one seed each, so chance is not excluded" if num_seeds == 1 else f"over all of {num_seeds} seeds"
    return f"{name} against {other_name}, {basis}: {'; '.join(clauses)}."
