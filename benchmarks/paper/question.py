# SPDX-License-Identifier: Apache-2.0
"""What the commands of this folder have in common: a question is some arms, what is compared, and a figure."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import intervals
import protocol
from options import ROOT, add_places, check_places
from runs import Run, Workplace, run_all

from trl_sipo.errors import ConfigurationError

REPORTS = ROOT / "reports" / "paper"
#: The untrained model, where a comparison needs it; it has no seeds.
BASE = "base"


@dataclass(frozen=True)
class Question:
    """A question of the paper, on the embedded model.

    Attributes:
        name: Of the command, and of the files that it writes.
        title: In words.
        arms: Label -> its run, without a seed.
        pairs: What is compared: labels of `arms`, or `BASE`; with a step after an "@" that of a measurement on the
            way. The first minus the second; Holm's correction is over all of them.
        late: Comparisons that follow from results: of the arms' measures, more pairs.
        more: Measures that need no training, such as of the base model; given the prepared place.
        draw: Writes the figure, given the result and a path.
    """

    name: str
    title: str
    arms: Mapping[str, Run]
    pairs: Sequence[tuple[str, str]]
    late: Callable[[Mapping[str, Any]], Sequence[tuple[str, str]]] = lambda found: ()
    more: Callable[[Workplace], dict[str, Any]] = lambda place: {}
    draw: Callable[[Mapping[str, Any], Path], None] | None = None


def make_parser(title: str) -> argparse.ArgumentParser:
    """The options of every question."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(protocol.SEEDS), help="of training")
    add_places(parser, REPORTS, "paper")
    return parser


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options with their defaults filled in.

    Raises:
        ConfigurationError: Options that no run can be made with.
    """
    if len(set(options.seeds)) != len(options.seeds) or min(options.seeds) < 0:
        raise ConfigurationError(f"--seeds {options.seeds}: give different numbers, none below 0.")
    check_places(options, REPORTS)
    return options


def ask(question: Question, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, compare, write `<name>.json` and the figure, and print the table.

    Args:
        question: The question.
        arguments: Of the command line; those of the process if not given.

    Returns:
        The result, as written.
    """
    from trl_sipo.demo.arm import write_json
    from trl_sipo.demo.demo import hush_libraries
    from trl_sipo.reporting.figures import check_plotting

    options = checked(make_parser(question.title).parse_args(arguments))
    check_plotting()
    hush_libraries()
    options.output.mkdir(parents=True, exist_ok=True)
    place = Workplace(options.runs, protocol.settings(quick=options.quick)).prepared(options.workers)
    records = records_of(question, place, options)
    result = {
        "question": question.name,
        "title": question.title,
        "command": f"python benchmarks/paper/{question.name}.py",
        "seeds": options.seeds,
        "protocol": protocol.as_record(quick=options.quick),
        "environment": versions(),
        **evaluated(question, records, place),
        **question.more(place),
    }
    write_json(options.output / f"{question.name}.json", result)
    if question.draw is not None:
        question.draw(result, options.output / f"{question.name}.png")
    print(table(result))
    print(f"Wrote {options.output / question.name}.json", file=sys.stderr)
    return result


def versions() -> dict[str, Any]:
    """Python, the packages and the kind of machine, without the name of its kernel."""
    from trl_sipo.scripts.env import environment

    return {**environment(), "platform": f"{platform.system()} {platform.machine()}"}


def records_of(question: Question, place: Workplace, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Label -> one record per seed; seed by seed, so that a command stopped early has all arms of the first seeds."""
    quick = options.quick
    runs = [protocol.with_seed(run, seed, quick=quick) for seed in options.seeds for run in question.arms.values()]
    found = run_all(runs, place, options.workers)
    labels, count = list(question.arms), len(question.arms)
    found = [with_masked_share(run) for run in found]
    return {label: found[position::count] for position, label in enumerate(labels)}


def with_masked_share(run: Mapping[str, Any]) -> dict[str, Any]:
    """The run with the masked share of the last steps before each measurement, as many for all runs.

    What the measurement itself has is since the one before, which are more steps in a run that is measured once.
    """
    records = []
    for record in run["records"]:
        rows = [row for row in run["log"] if record["step"] - protocol.EVAL_EVERY < row["step"] <= record["step"]]
        shares = [row["sipo/masked_fraction"] for row in rows if "sipo/masked_fraction" in row]
        records.append({**record, "masked_share": fmean(shares)} if shares else record)
    return {**run, "records": records}


def evaluated(
    question: Question, records: Mapping[str, Sequence[Mapping[str, Any]]], place: Workplace
) -> dict[str, Any]:
    """Measures, curves and comparisons of the arms."""
    per_prompt, base = place.settings.samples_per_prompt, place.base
    arms = {}
    for label, runs in records.items():
        last = [run["records"][-1] for run in runs]
        arms[label] = {
            "run": {name: value for name, value in runs[0]["run"].items() if name != "seed"},
            "seconds": [round(run["seconds"], 1) for run in runs],
            "final": intervals.measured(last, per_prompt),
            "curves": curves(runs),
            "log": [[{name: row[name] for name in LOGGED if name in row} for row in run["log"]] for run in runs],
        }
    pairs = [*question.pairs, *question.late(arms)]

    def at(point: str) -> list[Mapping[str, Any]]:
        label, _, step = point.partition("@")
        if label == BASE:
            return [base] * len(next(iter(records.values())))
        return [record_at(run, int(step) if step else None) for run in records[label]]

    rows = {f"{a} - {b}": intervals.compared(at(a), at(b), per_prompt) for a, b in pairs}
    return {
        "base": {**{name: base[name] for name in BASE_MEASURES}, **of_base(base, per_prompt)},
        "arms": arms,
        "comparisons": intervals.with_holm(rows),
    }


#: Of the trainer's log, over training.
LOGGED = ("step", "loss", "sipo/importance_weight", "sipo/masked_fraction", "grad_norm")
BASE_MEASURES = ("accuracy", "second_accuracy", "frechet_distance", "diversity")


def of_base(base: Mapping[str, Any], per_prompt: int) -> dict[str, Any]:
    """The base's accuracies have no seeds, but prompts."""
    return {
        f"{name}_over_prompts": intervals.over_prompts(base[field], per_prompt, (0.0, 1.0))
        for name, field in intervals.PER_IMAGE.items()
    }


def record_at(run: Mapping[str, Any], step: int | None) -> Mapping[str, Any]:
    """The measurement of a step; the last one without a step, or where the run is a quick one."""
    records = {record["step"]: record for record in run["records"]}
    if step is None or (step not in records and run["run"]["steps"] == protocol.QUICK_STEPS):
        return run["records"][-1]
    return records[step]


def curves(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each measure over steps, one list per seed."""
    names = [name for name in (*intervals.PER_IMAGE, *intervals.PER_RUN) if name in runs[0]["records"][0]]
    return {
        "steps": [record["step"] for record in runs[0]["records"]],
        **{name: [[record[name] for record in run["records"]] for run in runs] for name in names},
    }


COLUMNS = {
    "accuracy": ("accuracy", "{:.0%}"),
    "second_accuracy": ("second verifier", "{:.0%}"),
    "frechet_distance": ("Frechet distance", "{:.0f}"),
    "diversity": ("diversity", "{:.2f}"),
    "held_out_accuracies": ("implicit accuracy", "{:.0%}"),
    "masked_share": ("masked, last 50 steps", "{:.0%}"),
    "held_out_chosen_error": ("winner's error", "{:+.1f}"),
}


def table(result: Mapping[str, Any]) -> str:
    """The arms at their last step as Markdown: means over seeds, smallest and largest in brackets."""
    lines = [
        f"| arm | {' | '.join(title for title, _ in COLUMNS.values())} |",
        f"|---|{'---|' * len(COLUMNS)}",
        "| base model | "
        + " | ".join(form.format(result["base"][name]) if name in result["base"] else "" for name, form in _columns())
        + " |",
    ]
    for label, arm in result["arms"].items():
        cells = [cell(arm["final"][name], form) if name in arm["final"] else "" for name, form in _columns()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _columns() -> list[tuple[str, str]]:
    return [(name, form) for name, (_, form) in COLUMNS.items()]


def cell(row: Mapping[str, Any], form: str) -> str:
    """A mean with the smallest and largest seed."""
    values = row["values"]
    return f"{form.format(row['mean'])} [{form.format(min(values))}, {form.format(max(values))}]"


def read(name: str, folder: Path = REPORTS) -> dict[str, Any]:
    """The result of a question.

    Raises:
        ConfigurationError: It was not asked yet, or its file is torn.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist: run `python benchmarks/paper/{name}.py` first.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        message = f"{path} is no whole JSON ({error}): run `python benchmarks/paper/{name}.py` again."
        raise ConfigurationError(message) from error
