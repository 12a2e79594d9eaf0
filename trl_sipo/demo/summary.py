# SPDX-License-Identifier: Apache-2.0
"""From the runs to the numbers and sentences of the report. The sentences are computed from the numbers."""

from statistics import mean
from typing import Any

from trl_sipo.demo.settings import ARMS

# Fields of a record that are reported per method at the end of training.
MEASURES = (
    "accuracy",
    "class_accuracy",
    "colour_accuracy",
    "second_accuracy",
    "frechet_distance",
    "diversity",
    "held_out_accuracies",
    "held_out_chosen",
    "held_out_rejected",
    "masked_share",
)
# A method has collapsed when it keeps less than this share of the base's accuracy.
COLLAPSED_SHARE = 0.5


def spread(values: list[float]) -> dict[str, float]:
    """Mean, smallest and largest value, and the values themselves."""
    return {"mean": mean(values), "min": min(values), "max": max(values), "values": values}


def aggregate(results: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """Per arm: each measure at the last step over seeds, the best accuracy on the way, and how many runs collapsed."""
    methods = {}
    for arm in dict.fromkeys(result["arm"] for result in results):
        runs = [result for result in results if result["arm"] == arm]
        last = [run["records"][-1] for run in runs]
        collapsed = [record["accuracy"] < COLLAPSED_SHARE * base["accuracy"] for record in last]
        methods[arm] = {
            "label": ARMS[arm].label,
            "num_seeds": len(runs),
            "final": {name: spread([record[name] for record in last]) for name in MEASURES},
            "best_accuracy": spread([max(record["accuracy"] for record in run["records"]) for run in runs]),
            "num_collapsed": sum(collapsed),
        }
    return methods


def records(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every run's measurements, for the summary."""
    return [
        {"method": ARMS[run["arm"]].label, "arm": run["arm"], "seed": run["seed"], "steps": run["records"]}
        for run in results
    ]


def verdict(summary: dict[str, Any]) -> dict[str, list[str]]:
    """What was measured, in sentences that hold for these numbers and no others: of the base, and of each part."""
    base = summary["base"]
    base_sentence = (
        f"The base model draws what the prompt says in {base['accuracy']:.0%} of its images (Frechet distance "
        f"{base['frechet_distance']:.0f}, diversity {base['diversity']:.2f})."
    )
    parts = {source: part_verdict(part["methods"], summary["settings"]) for source, part in summary["parts"].items()}
    return {"base": [base_sentence], **parts}


def part_verdict(methods: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The sentences of one comparison."""
    sentences = []
    for arm, method in methods.items():
        final = method["final"]
        beta = settings["best_beta" if ARMS[arm].uses_best_beta else "beta"]
        sentences.append(
            f"{ARMS[arm].label} at beta {beta:g} ends at {final['accuracy']['mean']:.0%} "
            f"({_range(final['accuracy'])}), {_fate(method)}, with a Frechet distance of "
            f"{final['frechet_distance']['mean']:.0f} and a diversity of {final['diversity']['mean']:.2f}"
            + (f"; {final['masked_share']['mean']:.0%} of its last pairs were masked." if _masks(arm) else ".")
        )
    if {"dpo", "sipo"} <= set(methods):
        sentences.append(compare(methods["dpo"], methods["sipo"]))
    if {"sipo", "dpo_best"} <= set(methods):
        sentences.append(compare_with_best(methods["sipo"], methods["dpo_best"]))
    return sentences


def _masks(arm: str) -> bool:
    return ARMS[arm].method == "sipo" and ARMS[arm].overrides.get("mask", True)


def _range(values: dict[str, Any]) -> str:
    if len(values["values"]) == 1:
        return "one seed"
    return f"{values['min']:.0%} to {values['max']:.0%} over {len(values['values'])} seeds"


def _fate(method: dict[str, Any]) -> str:
    collapsed, seeds = method["num_collapsed"], method["num_seeds"]
    if collapsed == 0:
        return "no run collapsed"
    return "every run collapsed" if collapsed == seeds else f"{collapsed} of {seeds} runs collapsed"


def compare(dpo: dict[str, Any], sipo: dict[str, Any]) -> str:
    """SIPO against Diffusion-DPO at the same beta: only what every seed shows is claimed."""
    dpo_accuracy, sipo_accuracy = dpo["final"]["accuracy"], sipo["final"]["accuracy"]
    if sipo_accuracy["min"] > dpo_accuracy["max"]:
        better = "At this beta SIPO ends above Diffusion-DPO in accuracy for every pair of seeds."
    elif sipo_accuracy["max"] < dpo_accuracy["min"]:
        better = "At this beta SIPO ends below Diffusion-DPO in accuracy for every pair of seeds."
    else:
        better = "At this beta the accuracies of SIPO and Diffusion-DPO overlap over the seeds."
    quality = sipo["final"]["frechet_distance"]["mean"] < dpo["final"]["frechet_distance"]["mean"]
    variety = sipo["final"]["diversity"]["mean"] >= dpo["final"]["diversity"]["mean"]
    return (
        f"{better} Its Frechet distance is {'lower (better)' if quality else 'higher (worse)'} and its diversity "
        f"{'at least as high' if variety else 'lower'}."
    )


def compare_with_best(sipo: dict[str, Any], best: dict[str, Any]) -> str:
    """SIPO at the small beta against Diffusion-DPO at a well-chosen one."""
    sipo_final, best_final = sipo["final"], best["final"]
    numbers = (
        f"({sipo_final['accuracy']['mean']:.0%} against {best_final['accuracy']['mean']:.0%}, Frechet distance "
        f"{sipo_final['frechet_distance']['mean']:.0f} against {best_final['frechet_distance']['mean']:.0f})"
    )
    if best_final["accuracy"]["mean"] >= sipo_final["accuracy"]["mean"]:
        return (
            f"SIPO at the small beta does not end above Diffusion-DPO at its best one {numbers}: what it offers here "
            "is tolerance of a badly chosen beta, not a better optimum."
        )
    return f"SIPO at the small beta ends above Diffusion-DPO at its best one {numbers}."
