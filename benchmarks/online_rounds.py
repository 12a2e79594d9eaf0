# SPDX-License-Identifier: Apache-2.0
"""Rounds of Diffusion-DPO against SIPO on the demo's model: does either lose what it had, as in Fig. A1 of the paper?

    python benchmarks/online_rounds.py --output reports/online --runs online-runs --workers 2

Every run is `examples/configs/online_demo.yaml` with the method, beta and seed of the arm. Prompts and the noise of
samples are the same for all arms of a seed. A run that was stopped goes on when the same command is given again.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "configs" / "online_demo.yaml"
ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # The label, and what differs from the configuration.
    "dpo": ("Diffusion-DPO, beta 2", {"method": "dpo"}),
    "sipo": ("SIPO, beta 2", {"method": "sipo"}),
    "dpo_200": ("Diffusion-DPO, beta 200", {"method": "dpo", "training.beta": 200.0}),
    "sipo_200": ("SIPO, beta 200", {"method": "sipo", "training.beta": 200.0}),
}
METRICS = {
    "fashion": "reward of training",
    "fashion-correct": "accuracy by its judge",
    "fashion-second-correct": "accuracy by the second judge",
}
# Two-sided 95 % quantiles of Student's t, by degrees of freedom: intervals are over seeds.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def run_arm(arm: str, seed: int, runs: Path) -> dict[str, Any]:
    """One run from beginning to end, or what is missing of it; the summary as `online.json` has it."""
    from trl_sipo.online.config import make_config, read_settings, with_overrides
    from trl_sipo.online.rounds import run_rounds

    folder = runs / f"{arm}-{seed}"
    settings = {**read_settings(CONFIG), "output": str(folder), "seed": seed}
    settings["model"] = str(ROOT / settings["model"])
    words = [word for name, value in ARMS[arm][1].items() for word in (f"--{name}", str(value))]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as stream, redirect_stdout(stream), redirect_stderr(stream):
        return run_rounds(make_config(with_overrides(settings, words)))


def _prepare_worker() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)


def run_all(runs: Path, arms: Sequence[str], seeds: Sequence[int], workers: int) -> dict[str, list[dict[str, Any]]]:
    """Arm -> one summary per seed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
        jobs = {(arm, seed): pool.submit(run_arm, arm, seed, runs) for seed in seeds for arm in arms}
        for (arm, seed), job in jobs.items():
            job.result()
            print(f"{arm}, seed {seed}: done", flush=True)
    return {arm: [jobs[arm, seed].result() for seed in seeds] for arm in arms}


def curve(summary: Mapping[str, Any], metric: str) -> list[float]:
    """A metric of the base, and after each round."""
    rounds = [[row for row in part["evaluation"]["metrics"] if row["metric"] == metric] for part in summary["rounds"]]
    first = next(row for row in rounds[0] if row["model"] == "base")["mean"]["estimate"]
    return [first, *(next(row for row in rows if row["model"] == "policy")["mean"]["estimate"] for rows in rounds)]


def win_rates(summary: Mapping[str, Any], metric: str) -> list[float]:
    """Share of samples that beat the base's of the same noise, after each round."""
    return [
        next(row for row in part["evaluation"]["metrics"] if row["metric"] == metric and row["model"] == "policy")[
            "against_base"
        ]["win_rate"]["estimate"]
        for part in summary["rounds"]
    ]


def weight_curve(summary: Mapping[str, Any], name: str) -> dict[str, list[float]]:
    """Before training on its own data, after it, and the final policy's on the data of each round."""
    found = {(entry["policy"], entry["data"]): entry[name] for entry in summary["weights"]}
    count = len(summary["rounds"])
    return {
        "before": [found[data, data] for data in range(count)],
        "after": [found[data + 1, data] for data in range(count)],
        "final": [found[count, data] for data in range(count)],
    }


def masked_share(log: Sequence[Mapping[str, Any]]) -> float:
    """Of the pairs of a round's training."""
    return statistics.fmean(row["sipo/masked_fraction"] for row in log)


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean, 95 % interval of Student's t, and ends of what was seen, over seeds."""
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    half = STUDENT_T.get(len(values) - 1, math.nan) * spread / math.sqrt(len(values))
    seen = {"smallest": min(values), "largest": max(values)}
    return {"mean": mean, "low": mean - half, "high": mean + half, **seen}


def aggregate(summaries: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the report says of each arm."""
    found: dict[str, Any] = {}
    for arm, runs in summaries.items():
        curves = {metric: [curve(run, metric) for run in runs] for metric in METRICS}
        wins = [win_rates(run, "fashion-second") for run in runs]
        variety = [[part["evaluation"]["variety"] for part in run["rounds"]] for run in runs]
        weights = {name: [weight_curve(run, name) for run in runs] for name in ("mean", "masked_share")}
        found[arm] = {
            "label": ARMS[arm][0],
            "curves": curves,
            "win_rate_second": wins,
            "final": {metric: over_seeds([values[-1] for values in rows]) for metric, rows in curves.items()},
            "lowest": {metric: over_seeds([min(values) for values in rows]) for metric, rows in curves.items()},
            "final_win_rate": over_seeds([values[-1] for values in wins]),
            "final_spread": over_seeds([rows[-1]["relative_spread"]["estimate"] for rows in variety]),
            "final_drift": over_seeds([rows[-1]["drift"]["estimate"] for rows in variety]),
            "pairs": [[part["pairs"] for part in run["rounds"]] for run in runs],
            "masked_in_training": [[masked_share(part["log"]) for part in run["rounds"]] for run in runs],
            "weights": weights,
        }
    return found


def over_base(found: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Of the base model, which is the same for all arms of a seed."""
    return over_seeds([values[0] for values in next(iter(found.values()))["curves"][metric]])


def paired(found: Mapping[str, Any], one: str, other: str, metric: str) -> dict[str, dict[str, float]]:
    """One arm minus another by seed, which share prompts and noise: of final policies, mean and lowest rounds."""
    pairs = list(zip(found[one]["curves"][metric], found[other]["curves"][metric], strict=True))
    return {
        "final": over_seeds([first[-1] - second[-1] for first, second in pairs]),
        "mean_of_rounds": over_seeds([statistics.fmean(a[1:]) - statistics.fmean(b[1:]) for a, b in pairs]),
        "lowest": over_seeds([min(a[1:]) - min(b[1:]) for a, b in pairs]),
    }


def table(found: Mapping[str, Any]) -> str:
    """The final policies as Markdown: means over seeds, smallest and largest in brackets."""

    def cell(interval: Mapping[str, float], percent: bool = True) -> str:
        show = (lambda value: f"{value:.0%}") if percent else (lambda value: f"{value:.2f}")
        return f"{show(interval['mean'])} [{show(interval['smallest'])}, {show(interval['largest'])}]"

    lines = [
        "| method | accuracy, its judge | accuracy, second judge | lowest of any round | win rate against the base, "
        "second judge | spread | drift |",
        "|---|---|---|---|---|---|---|",
        f"| base model | {cell(over_base(found, 'fashion-correct'))} | "
        f"{cell(over_base(found, 'fashion-second-correct'))} | | | 1 | 0 |",
    ]
    for arm in found.values():
        final = arm["final"]
        cells = [
            cell(final["fashion-correct"]),
            cell(final["fashion-second-correct"]),
            cell(arm["lowest"]["fashion-second-correct"]),
            cell(arm["final_win_rate"]),
            cell(arm["final_spread"], percent=False),
            cell(arm["final_drift"], percent=False),
        ]
        lines.append(f"| {arm['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_figures(found: Mapping[str, Any], output: Path) -> None:
    """Quality over rounds, and importance weights by the round of the data."""
    from trl_sipo.reporting.figures import Series, quality_figure

    def series(values_of: Any, start: int) -> list[Series]:
        lines = []
        for arm in found.values():
            values = values_of(arm)
            lines.append(Series(arm["label"], list(range(start, start + len(values[0]))), values))
        return lines

    panels = {label: series(lambda arm, name=name: arm["curves"][name], 0) for name, label in METRICS.items()}
    quality_figure(panels, x_label="rounds of training").savefig(output / "quality.png", dpi=130)
    words = {"before": "policy that drew them", "after": "after training on them", "final": "final policy"}
    panels = {
        f"mean w of a round's pairs: {text}": series(
            lambda arm, key=key: [run[key] for run in arm["weights"]["mean"]], 0
        )
        for key, text in words.items()
    }
    quality_figure(panels, x_label="round of the pairs").savefig(output / "weights.png", dpi=130)


def main() -> None:
    """Run, aggregate, write numbers and figures, and print the table."""
    from trl_sipo.scripts.env import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where numbers and figures go")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs go")
    parser.add_argument("--arms", nargs="+", default=["dpo", "sipo", "dpo_200"], choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    found = aggregate(run_all(arguments.runs, arguments.arms, arguments.seeds, arguments.workers))
    arguments.output.mkdir(parents=True, exist_ok=True)
    differences = {
        f"{arm} minus {arguments.arms[0]}": {
            metric: paired(found, arm, arguments.arms[0], metric) for metric in METRICS
        }
        for arm in arguments.arms[1:]
    }
    numbers = {
        "seeds": arguments.seeds,
        "environment": environment(),
        "arms": found,
        "differences": differences,
    }
    (arguments.output / "online.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw_figures(found, arguments.output)
    print(table(found))


if __name__ == "__main__":
    main()
