# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo evaluate`: base against tuned, by rewards, held-out pairs, variety and pictures, with error bars."""

import argparse
import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import ArgumentParser, words_without_secrets
from trl_sipo.scripts.sampling_options import (
    SCORES_CACHE,
    add_prompt_options,
    add_reward_options,
    add_sampling_options,
    check_sampling_options,
    chosen_prompts,
    opened_rewards,
    print_table,
    sampling_settings,
)

if TYPE_CHECKING:
    from trl_sipo.evaluation.evaluate import HeldOutData, Measured
    from trl_sipo.reporting.evaluation_page import Grid

_LONGEST_NAME = 80  # of a reward, in the name of a file
_PACKAGES = ("trl-sipo", "torch", "diffusers", "transformers")


def make_parser(prog: str = "trl-sipo evaluate") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Compare models with the first one: the same prompts, noise, sampler and guidance for all. A run "
        "that was stopped goes on where it was when the same command is given again.",
        allow_abbrev=False,
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=MODEL[+LORA]", help="the base first")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--title", help="of the report (default: the models' names)")
    add_prompt_options(parser)
    add_sampling_options(parser, samples_per_prompt=4)
    add_reward_options(parser)
    add = parser.add_argument_group("held-out pairs").add_argument
    add("--dataset_name", metavar="PATH", help="pairs whose implicit preferences are measured (default: none)")
    add("--dataset_config", metavar="NAME")
    add("--dataset_split", default="test", help="default: %(default)s; a single file has the split train")
    add("--dataset_format", metavar="NAME", help="layout of the data (default: recognised by its columns)")
    add("--dataset_media_folder", metavar="DIR", help="folder to which paths are relative (default: their table's)")
    add("--max_pairs", type=int, metavar="N", help="take the first ones only")
    add("--eval_noise_levels", type=int, default=10, metavar="N", help="default: %(default)s")
    add("--beta", type=float, help="of implicit margins, in the Diffusion-DPO convention (default: Diffusion-DPO's)")
    add = parser.add_argument_group("report").add_argument
    add("--features", default="pixels", help="of variety and drift: pixels, clip or clip:MODEL (default: %(default)s)")
    add("--level", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    add("--num_resamples", type=int, default=2000, help="of the bootstrap (default: %(default)s)")
    add("--num_shown", type=int, default=6, help="largest wins and losses in a picture (default: %(default)s)")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] on options that make no sense, before anything is loaded."""
    check_sampling_options(arguments)
    for name in ("max_pairs", "eval_noise_levels", "num_shown"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"`--{name}` must be at least 1, got {value}.")
    if arguments.beta is not None and not 0 < arguments.beta < math.inf:
        raise ConfigurationError(f"`--beta` must be a positive number, got {arguments.beta}.")
    if len(arguments.models) < 2:
        raise ConfigurationError(
            "`--models` takes two or more, the base first: base=org/model tuned=org/model+runs/sipo. To score one "
            "model, give it twice under two names."
        )


def held_out_data(arguments: argparse.Namespace) -> "HeldOutData | None":
    """The held-out pairs that the options ask for, with the settings of `trainer.evaluate()`."""
    if arguments.dataset_name is None:
        return None
    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.evaluation.evaluate import HeldOutData
    from trl_sipo.trainer.diffusion_dpo_config import DiffusionDPOConfig

    rows = load_preference_dataset(
        arguments.dataset_name,
        name=arguments.dataset_config,
        split=arguments.dataset_split,
        format=arguments.dataset_format,
        media_folder=arguments.dataset_media_folder,
    )
    size = None if arguments.height is None else [arguments.height, arguments.width or arguments.height]
    options = {"num_frames": arguments.num_frames, "frame_rate": arguments.frame_rate, "beta": arguments.beta}
    args = DiffusionDPOConfig(  # nothing is trained, nor written there
        "evaluate",
        resolution=size,
        eval_noise_levels=arguments.eval_noise_levels,
        eval_noise_seed=arguments.seed,
        bf16=False,
        use_cpu=True,
        report_to="none",
        **{name: value for name, value in options.items() if value is not None},
    )
    return HeldOutData(rows, f"{arguments.dataset_name}/{arguments.dataset_split}", args, arguments.max_pairs)


def run(command: str, argv: list[str]) -> None:
    """Measure, compare, and write the report.

    Raises:
        ConfigurationError: Options that make no sense, or models that do not take them.
        BackboneError, DatasetError, NumericalError, RewardError, StorageError: As the parts do.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    check_arguments(arguments)
    from trl_sipo.evaluation.comparison import StatisticsSettings, compare_models
    from trl_sipo.evaluation.diversity import load_features
    from trl_sipo.evaluation.evaluate import as_json, measure_models
    from trl_sipo.generation.models import check_models, parse_models
    from trl_sipo.generation.processes import chosen_device, process_state
    from trl_sipo.trainer.diffusion_dpo_config import DiffusionDPOConfig

    device = chosen_device(arguments.device)
    specs, sampling = parse_models(arguments.models), sampling_settings(arguments)
    statistics = StatisticsSettings(arguments.level, arguments.num_resamples, arguments.seed)
    prompts, held_out = chosen_prompts(arguments), held_out_data(arguments)
    check_models(specs)
    features, features_name = load_features(arguments.features, device)
    with ExitStack() as stack:
        rewards = opened_rewards(arguments, arguments.output / SCORES_CACHE, stack)
        measured = measure_models(
            *(specs, prompts, rewards, arguments.output, sampling),
            held_out=held_out,
            features=features,
            dtype=arguments.dtype,
            device=device,
            sampling_batch_size=arguments.sampling_batch_size,
            scoring_batch_size=arguments.scoring_batch_size,
        )
    if not process_state().is_main_process:
        return
    beta = arguments.beta or DiffusionDPOConfig.default_beta
    parts = (measured.scored, measured.features, measured.errors)
    comparison = compare_models(*parts, base=specs[0].name, beta=beta, settings=statistics)
    report = {
        "title": arguments.title or " against ".join([", ".join(spec.name for spec in specs[1:]), specs[0].name]),
        "command": shlex.join(words_without_secrets(["trl-sipo", command, *argv])),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "models": [str(spec) for spec in specs],
        "prompts": {"set": arguments.prompts, "number": len(prompts)},
        "settings": as_json({**sampling.__dict__, **statistics.__dict__, "dtype": arguments.dtype}),
        "drawn_otherwise": dict(measured.drawn_otherwise),
        "features": features_name,
        "beta": beta,
        "rewards": _rewards(measured),
        **as_json(comparison),
    }
    write_report(arguments.output, report, change_grids(measured, specs[0].name, arguments.num_shown))
    tell(report, arguments.output)


def _rewards(measured: "Measured") -> dict[str, Any]:
    first = next(iter(measured.scored.values()))
    fields = ("convention", "licence", "higher_is_better")
    return {name: {field: getattr(info, field) for field in fields} for name, info in first.infos.items()}


def change_grids(measured: "Measured", base: str, count: int) -> list["Grid"]:
    """Pictures of the largest wins and losses of every candidate, by every reward."""
    from trl_sipo.evaluation.comparison import largest_changes
    from trl_sipo.reporting.evaluation_page import Change, change_grid

    grids, before = [], measured.scored[base]
    files = file_names(list(before.scores))
    for name, after in measured.scored.items():
        for metric in before.scores if name != base else ():
            for words, indices in zip(("wins", "losses"), largest_changes(before, after, metric, count), strict=True):
                if not indices:
                    continue
                changes = [
                    Change(
                        after.samples[index].record.prompt,
                        before.samples[index].open(),
                        after.samples[index].open(),
                        float(before.scores[metric][index]),
                        float(after.scores[metric][index]),
                    )
                    for index in indices
                ]
                caption = f"Largest {words} of {name} by {metric}, one a prompt: {base} left, {name} right."
                grids.append(change_grid(f"{name}-{files[metric]}-{words}", caption, changes))
    return grids


def file_names(metrics: Sequence[str]) -> dict[str, str]:
    """A name of a file for each reward; a number sets apart those that differ in characters no file may have."""
    names: dict[str, str] = {}
    for metric in metrics:
        plain = "".join(char if char.isalnum() or char in "._-" else "_" for char in metric)[:_LONGEST_NAME]
        taken, count = set(names.values()), 1
        while (name := plain if count == 1 else f"{plain}-{count}") in taken:
            count += 1
        names[metric] = name
    return names


def write_report(output: Path, report: Mapping[str, Any], grids: list["Grid"]) -> None:
    """`evaluation.json`, `metrics.csv`, `report.md`, `report.html` and the pictures."""
    from trl_sipo.data.cache.shards import write_whole
    from trl_sipo.reporting.evaluation_page import evaluation_page
    from trl_sipo.reporting.evaluation_tables import markdown, metrics_csv

    texts = {
        "evaluation.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
        "metrics.csv": metrics_csv(report),
        "report.md": markdown(report),
        "report.html": evaluation_page(report, grids),
    }
    for name, text in texts.items():
        write_whole(output / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    for old in (output / "grids").glob("*.png"):  # of a run with other models or rewards
        old.unlink()
    for grid in grids:
        write_whole(output / "grids" / f"{grid.name}.png", lambda path, grid=grid: grid.image.save(path, format="PNG"))


def tell(report: Mapping[str, Any], output: Path) -> None:
    """Print the verdict and the table of win rates."""
    from trl_sipo.reporting.evaluation_tables import tables, verdict

    wins = tables(report)[1]
    print_table(wins.header, wins.rows)
    print()
    for sentence in verdict(report):
        print(f"- {sentence}")
    print(f"\nOpen {output / 'report.html'}; numbers are in evaluation.json and metrics.csv.")
