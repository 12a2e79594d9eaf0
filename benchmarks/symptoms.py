# SPDX-License-Identifier: Apache-2.0
"""What healthy and unhealthy runs look like, on the demo's model: the pictures of the page on troubleshooting.

    python benchmarks/symptoms.py                            # about three minutes of one core

One model, the same pairs, noise, seed, batch and number of steps; what differs is named. Writes the logged numbers as
JSON and two pictures: the curves of every run, and what each draws in the end from the same noise.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from records import add_common_options, write_record
from tqdm.auto import tqdm
from transformers import PrinterCallback

from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.demo.arm import DemoFiles, draw, make_config, to_bytes
from trl_sipo.demo.demo import hush_libraries
from trl_sipo.demo.images import ImageMedium
from trl_sipo.demo.prepare import prepare_pairs
from trl_sipo.demo.settings import DemoSettings, find_arm
from trl_sipo.demo.verifier import load_verifiers
from trl_sipo.reporting.figures import COLOURS, STYLES, check_plotting, sample_grid
from trl_sipo.trainer.methods import method_classes

SOURCE = "on_policy"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        arm: Key of `trl_sipo.demo.settings.ARMS`, with a beta of its own.
        learning_rate: Of AdamW.
    """

    arm: str
    learning_rate: float = 1e-4


RUNS = {
    "beta 1000, which fits": Run("dpo@1000"),
    "beta 2, far too small": Run("dpo@2"),
    "beta 2, SIPO's mask": Run("sipo@2"),
    "beta 1e7, far too large": Run("dpo@1e7"),
    "learning rate 1e-8": Run("dpo@1000", 1e-8),
}
# Title of a panel -> the logged key, and whether its axis is symmetrically logarithmic.
PANELS = {
    "loss": ("loss", True),
    "held-out rewards/accuracies": ("eval_rewards/accuracies", False),
    "held-out drift/chosen_error": ("eval_drift/chosen_error", True),
    "rewards/saturated_fraction": ("rewards/saturated_fraction", False),
    "sipo/masked_fraction": ("sipo/masked_fraction", False),
    "grad_norm": ("grad_norm", True),
}


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, "reports/symptoms/symptoms.json")
    parser.add_argument("--steps", type=int, default=120, help="of each run (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=384, help="of the demo's model (default: %(default)s)")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME", help="which runs")
    parser.add_argument(
        "--pictures", type=Path, default=Path("docs/source/images"), help="their folder (default: %(default)s)"
    )
    return parser


def train(run: Run, settings: DemoSettings, files: DemoFiles, medium: ImageMedium, prompts: list) -> dict[str, Any]:
    """The log of a run, and pictures of `prompts` at its end."""
    settings = replace(settings, learning_rate=run.learning_rate)
    arm = find_arm(run.arm)
    with tempfile.TemporaryDirectory() as folder:
        trainer = method_classes(arm.method)[1](
            medium.load_pipeline(files.base_pipeline),
            args=make_config(arm, 0, settings, medium, Path(folder)),
            train_dataset=load_preference_dataset(str(files.train_pairs(SOURCE))),
            eval_dataset=load_preference_dataset(str(files.held_out_pairs(SOURCE))),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    samples = draw(trainer.adapter.pipeline, prompts, settings, medium)
    return {"log": trainer.state.log_history, "samples": samples}


def curve(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged key."""
    rows = [row for row in log if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def curves(log: list[dict[str, Any]]) -> dict[str, dict[str, list]]:
    """Every panel's key, with steps and values."""
    keys = [key for key, _ in PANELS.values()]
    return {key: dict(zip(("steps", "values"), curve(log, key), strict=True)) for key in keys}


def metrics_figure(logs: Mapping[str, list[dict[str, Any]]]) -> Any:
    """A panel per key, a line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    for axes, (title, (key, is_log)) in zip(panels.flat, PANELS.items(), strict=True):
        for index, (name, log) in enumerate(logs.items()):
            axes.plot(*curve(log, key), color=COLOURS[index], linestyle=STYLES[index], linewidth=1.6, label=name)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if is_log:
            axes.set_yscale("symlog", linthresh=0.05)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Prepare the pairs, make the runs, draw."""
    options = make_parser().parse_args(argv)
    check_plotting()
    hush_libraries()
    torch.set_num_threads(options.threads or 1)
    options.pictures.mkdir(parents=True, exist_ok=True)
    # Six measurements of the held-out pairs: more would take longer than the training.
    settings = DemoSettings((), options.steps, max(1, options.steps // 6), num_pairs=options.pairs)
    medium = ImageMedium()
    prompts = [prompt for row, prompt in enumerate(medium.all_prompts()) if row % 9 == 0]  # each class and colour once
    logs, columns = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = DemoFiles(Path(folder), medium.base)
        pipeline = medium.load_pipeline(files.base_pipeline)
        prepare_pairs(pipeline, load_verifiers(files.verifiers)[0], settings, SOURCE, files, medium)
        columns["base model"] = draw(pipeline, prompts, settings, medium)
        for name in tqdm(options.runs, desc="Runs"):
            done = train(RUNS[name], settings, files, medium, prompts)
            logs[name], columns[name] = done["log"], done["samples"]
    pictures = {name: [medium.picture(sample) for sample in to_bytes(samples)] for name, samples in columns.items()}
    grid = sample_grid(pictures, [prompt.text for prompt in prompts], cell=72)
    grid.quantize(96).save(options.pictures / "symptoms_samples.png", optimize=True)
    metrics_figure(logs).savefig(options.pictures / "symptoms_metrics.png", dpi=90)
    runs = {name: {**asdict(RUNS[name]), "curves": curves(log)} for name, log in logs.items()}
    write_record(options, {}, runs=runs)


if __name__ == "__main__":
    main()
