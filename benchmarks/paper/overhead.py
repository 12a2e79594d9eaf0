# SPDX-License-Identifier: Apache-2.0
"""What does each objective cost beside Diffusion-DPO? ("moderate" overhead, limitations of the SIPO paper)

    python benchmarks/paper/overhead.py

One training step of each on the same batch of the embedded model: operations and bytes kept for the backward pass,
which are counted, and processor seconds, of which ratios are taken within a round, since rounds differ in what else
the machine does. The objectives take turns, in another order each round.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import protocol
from options import ROOT, guarded
from protocol import METHODS, arm
from question import checked, make_parser, versions
from runs import Run, Workplace

NAMES = ("DPO", "C&M", "SIPO", "SIPO, weight detached", "dynamic mask", "Poly-DPO")
ROUNDS, QUICK_ROUNDS = 60, 2
ITSELF = {"mean": 1.0, "low": 1.0, "high": 1.0}


def make_trainer(run: Run, place: Workplace, folder: Path) -> Any:
    """The trainer of a method, with one batch of pairs.

    Args:
        run: The method.
        place: A prepared one.
        folder: For what the trainer writes.
    """
    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.demo.arm import make_config
    from trl_sipo.demo.images import IMAGES
    from trl_sipo.demo.settings import Arm
    from trl_sipo.trainer.methods import method_classes

    settings = replace(place.settings, max_steps=run.steps)
    pairs = load_preference_dataset(str(place.files.train_pairs(run.source)))
    return method_classes(run.method)[1](
        IMAGES.load_pipeline(place.files.base_pipeline),
        args=make_config(Arm(run.method, run.method, dict(run.overrides)), 0, settings, IMAGES, folder),
        train_dataset=pairs.select(range(settings.batch_size)),
        eval_dataset=pairs.select(range(settings.batch_size)),
    )


def interval_of_ratio(seconds: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Geometric mean of the ratios of rounds, with a bootstrap-t interval over rounds."""
    from trl_sipo.evaluation.statistics import by_cluster, clustered_interval

    logs = [log(one / other) for one, other in zip(seconds, others, strict=True)]
    found = clustered_interval(by_cluster(logs, range(len(logs))))
    return {"mean": exp(found.estimate), "low": exp(found.low), "high": exp(found.high)}


def in_turns(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each step, round by round."""
    from tqdm.auto import tqdm

    timed = counting().timed
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    chance = random.Random(0)
    for _ in tqdm(range(rounds), desc="Rounds of one step each", unit="round"):
        chance.shuffle(order)
        for name in order:
            seconds[name].append(timed(steps[name], "cpu"))
    return seconds


def counting() -> Any:
    """The module that counts what a step takes, from the folder above."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    import step_counting

    return step_counting


def measure(place: Workplace, rounds: int) -> dict[str, dict[str, Any]]:
    """Objective -> operations, bytes, seconds by round, and their ratios to Diffusion-DPO."""
    module = counting()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: arm(name, protocol.GOOD_BETA) for name in NAMES}
        steps = {
            name: module.RepeatedStep(make_trainer(run, place, Path(folder) / name), run.steps)
            for name, run in runs.items()
        }
        for step in steps.values():
            step()  # makes the optimiser's state
        counted = {
            name: {"flops": module.count_flops(step), "bytes": module.activation_bytes(step, step.model, "cpu")}
            for name, step in steps.items()
        }
    seconds = in_turns(steps, rounds)
    first = NAMES[0]
    return {
        name: {
            "method": METHODS[name][0],
            **counted[name],
            "flops_ratio": counted[name]["flops"] / counted[first]["flops"],
            "bytes_ratio": counted[name]["bytes"] / counted[first]["bytes"],
            "seconds_ratio": interval_of_ratio(seconds[name], seconds[first]) if name != first else ITSELF,
            "seconds": [round(value, 4) for value in seconds[name]],
        }
        for name in NAMES
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Ratios to Diffusion-DPO as Markdown."""
    lines = ["| objective | operations | bytes kept | processor time |", "|---|---|---|---|"]
    for name, row in found.items():
        time = row["seconds_ratio"]
        lines.append(
            f"| {name} | {row['flops_ratio']:.3f} | {row['bytes_ratio']:.3f} | {time['mean']:.3f} "
            f"[{time['low']:.3f}, {time['high']:.3f}] |"
        )
    return "\n".join(lines)


def ask(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write `overhead.json`, and print the table; returns what was written."""
    options = checked(_parser().parse_args(arguments))
    from trl_sipo.demo.arm import write_json
    from trl_sipo.demo.demo import hush_libraries

    hush_libraries()
    options.output.mkdir(parents=True, exist_ok=True)
    place = Workplace(options.runs, protocol.settings(quick=options.quick)).prepared(1)
    import torch

    torch.set_num_threads(1)
    found = measure(place, QUICK_ROUNDS if options.quick else ROUNDS)
    result = {
        "question": "overhead",
        "title": "Overhead",
        "command": "python benchmarks/paper/overhead.py",
        "protocol": {**protocol.as_record(quick=options.quick), "rounds": QUICK_ROUNDS if options.quick else ROUNDS},
        "environment": versions(),
        "objectives": found,
    }
    write_json(options.output / "overhead.json", result)
    print(table(found))
    return result


def _parser() -> argparse.ArgumentParser:
    return make_parser("Overhead")


if __name__ == "__main__":
    guarded(ask)
