# SPDX-License-Identifier: Apache-2.0
"""The paper's questions on real models: the commands of every run, and what they would cost.

    python benchmarks/paper/real_models.py                                    # the sweeps and their sizes
    python benchmarks/paper/real_models.py --model sd15 --question ablation --dataset_name cache   # its commands
    python benchmarks/paper/real_models.py --write       # count the steps, write reports/paper/real_models.{json,md}

Nothing is trained here, and no weights are read: run the commands on a cluster. Costs are those of `trl-sipo audit
cost`; no GPU was measured.
"""

import argparse
import json
import re
import shlex
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.scripts.cost_plan import Around, TrainingCommand, make_plan, parse_command, size_of
from trl_sipo.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).resolve().parent / "configs"
REPORT = ROOT / "reports" / "paper"
DATA = "your/preferences"
METHOD = "sipo"
SEEDS = 3
GPUS_PER_MACHINE = 8
OWN_PAIRS = 10_000
"""Pairs of own samples, as many as the paper's pairs of videos."""
SAMPLER_STEPS = 50


@dataclass(frozen=True)
class RealModel:
    """A model of `configs/models.yaml`.

    Attributes:
        name: Its key.
        config: Path of its settings, from the root of the repository.
        settings: What differs from them.
        accelerate: Path of the file for `accelerate launch`.
        strategy: A member of `trl_sipo.cost.communication.STRATEGIES`.
        processes: GPUs.
        gpu: A key of `trl_sipo.cost.devices.GPUS`.
    """

    name: str
    config: str
    settings: dict[str, Any]
    accelerate: str
    strategy: str
    processes: int
    gpu: str


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        model: On which model.
        question: Key of `configs/questions.yaml`.
        arm: Its name there.
        seed: Of the run.
        settings: What differs from the model's file.
        data: Which data beside the given ones: "", or a name.
    """

    model: RealModel
    question: str
    arm: str
    seed: int
    settings: dict[str, Any]
    data: str = ""

    @property
    def output_dir(self) -> str:
        """Where the run writes."""
        arm = re.sub(r"[^\w.]+", "-", self.arm).strip("-")
        return f"runs/{self.model.name}/{self.question}/{arm}/seed-{self.seed}"


def read_models() -> dict[str, RealModel]:
    """All models by name."""
    return {name: RealModel(name, **entry) for name, entry in read_yaml(CONFIGS / "models.yaml").items()}


def read_questions() -> dict[str, dict[str, Any]]:
    """All questions by name: `asks`, `paper`, and `arms`."""
    return read_yaml(CONFIGS / "questions.yaml")


def words_of(settings: dict[str, Any]) -> list[str]:
    """Settings as options of a command."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(one).lower() if isinstance(one, bool) else str(one) for one in values)]
    return words


@cache
def base_of(name: str) -> TrainingCommand:
    """The settings of a model without those of a sweep."""
    return parse(read_models()[name])


def parse(model: RealModel, settings: dict[str, Any] | None = None) -> TrainingCommand:
    """The settings of a run, by the real parser.

    Raises:
        ConfigurationError: An unknown setting, or a value that is none.
    """
    words = ["--config", str(ROOT / model.config), *words_of(model.settings), *words_of(settings or {})]
    return parse_command(METHOD, words)


def runs_of(model: RealModel, question: str, seeds: int = SEEDS) -> list[Run]:
    """Every arm with every seed."""
    base = base_of(model.name).training
    runs = []
    for arm, entry in read_questions()[question]["arms"].items():
        settings = dict(entry.get("settings", {}))
        for name, factor in entry.get("times", {}).items():
            value = getattr(base, name) * factor
            settings[name] = round(value) if isinstance(getattr(base, name), int) else value
        runs += [Run(model, question, arm, seed, settings, entry.get("data", "")) for seed in range(seeds)]
    return runs


def command_of(run: Run, dataset_name: str = DATA) -> str:
    """What to type on each machine of the cluster."""
    model, precision = run.model, base_of(run.model.name).precision
    half = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}[precision]
    machines = -(-model.processes // GPUS_PER_MACHINE)
    launcher = ["accelerate", "launch", "--config_file", model.accelerate, "--mixed_precision", half]
    launcher += ["--num_machines", str(machines), "--num_processes", str(model.processes)]
    several = (
        '--machine_rank "$RANK" --main_process_ip "$MASTER_ADDR" --main_process_port 29500' if machines > 1 else ""
    )
    data = f"{dataset_name}-{run.data}" if run.data else dataset_name
    options = [*words_of(model.settings), *words_of(run.settings), "--seed", str(run.seed)]
    training = ["-m", "trl_sipo.scripts.train", METHOD, "--config", model.config, "--dataset_name", data]
    training += ["--output_dir", run.output_dir, *options]
    return " ".join(part for part in (shlex.join(launcher), several, shlex.join(training)) if part)


# ---------------------------------------------------------------------------------------------------------------- cost


def measure_model(model: RealModel) -> dict[str, Any]:
    """What a step of a model takes: bytes, operations, and seconds on the GPUs that it is to run on."""
    from trl_sipo.cost.devices import find_gpu
    from trl_sipo.cost.duration import computing
    from trl_sipo.cost.estimate import estimate
    from trl_sipo.cost.models import find_model, guidance_passes
    from trl_sipo.cost.operations import total_flops
    from trl_sipo.cost.step import count

    command = parse(model)
    found = find_model(command.model.model_name_or_path, size_of(command))
    around = Around(processes=model.processes, strategy=model.strategy, is_cached=True)
    plan, gpu = make_plan(command, found, around), find_gpu(model.gpu)
    counts = count(found, plan.step)
    cost = estimate(counts, plan, gpu)
    forward = computing(counts.reference, gpu) * (1 / plan.step.samples)
    return {
        "parameters": counts.parameters,
        "trained": counts.trained,
        "pairs_per_step": plan.pairs_per_step,
        "peak_bytes": cost.peak,
        "room_bytes": cost.room,
        "flops_per_call": total_flops(counts.policy) + total_flops(counts.reference),
        "calls_per_step": plan.accumulation,
        "step_seconds": asdict(cost.step),
        "forward_seconds": asdict(forward),
        "guidance_passes": guidance_passes(found.architecture),
    }


def gpu_hours(model: RealModel, measured: dict[str, Any], steps: int) -> tuple[float, float]:
    """Of so many steps, at best and at worst."""
    low, high = (measured["step_seconds"][end] * steps * model.processes / 3600 for end in ("low", "high"))
    return low, high


def sampling_hours(measured: dict[str, Any]) -> tuple[float, float]:
    """GPU-hours of drawing `OWN_PAIRS` pairs with guidance, from the denoiser's passes alone."""
    passes = 2 * OWN_PAIRS * SAMPLER_STEPS * measured["guidance_passes"]
    low, high = (measured["forward_seconds"][end] * passes / 3600 for end in ("low", "high"))
    return low, high


def question_hours(model: RealModel, question: str, measured: dict[str, Any]) -> tuple[int, float, float]:
    """Runs of a question, and their GPU-hours together, own samples included."""
    runs = runs_of(model, question)
    steps = sum(run.settings.get("max_steps", base_of(model.name).training.max_steps) for run in runs)
    low, high = gpu_hours(model, measured, steps)
    if any(run.data == "own" for run in runs):
        drawn = sampling_hours(measured)
        low, high = low + drawn[0], high + drawn[1]
    return len(runs), low, high


def span(low: float, high: float) -> str:
    """A range in two digits, such as "1,300 to 2,200"."""
    return " to ".join(f"{float(f'{value:.2g}'):,g}" for value in (low, high))


def page(measured: dict[str, dict[str, Any]]) -> str:
    """`real_models.md`, from what a step of each model takes and the files of settings."""
    models, questions = read_models(), read_questions()
    lines = [
        "# The paper's questions on real models: what they would cost",
        "",
        "**Nothing here was run, and no GPU was measured.** Steps are counted on models without weights, and times "
        "follow from published rates, from used well to used badly ([how](../../docs/source/cost.md)). Written by "
        "`python benchmarks/paper/real_models.py --write`; the sweeps are in "
        "[benchmarks/paper/configs](../../benchmarks/paper/configs/questions.yaml), the settings of each model in "
        "[examples/configs](../../examples/README.md#configurations).",
        "",
        "## One run",
        "",
        "| model | settings | GPUs | pairs a step | GiB needed, of | seconds a step | steps | GPU-hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in measured.items():
        model, steps = models[name], base_of(name).training.max_steps
        seconds, file = entry["step_seconds"], Path(model.config)
        lines.append(
            f"| {name} | [{file.name}](../../{model.config}) | {model.processes} {model.gpu} | "
            f"{entry['pairs_per_step']} | {entry['peak_bytes'] / 2**30:.0f}, {entry['room_bytes'] / 2**30:.0f} | "
            f"{span(seconds['low'], seconds['high'])} | {steps} | {span(*gpu_hours(model, entry, steps))} |"
        )
    lines += [
        "",
        f"## Each question, with {SEEDS} seeds",
        "",
        "GPU-hours of all its runs. Evaluation is not in it; of own samples the drawing is "
        f"({OWN_PAIRS:,} pairs, {SAMPLER_STEPS} steps of the sampler with guidance, the denoiser alone). The static "
        "mask cuts what SIPO masks of Stable Diffusion 1.5 at the start; for another model give the region that "
        "`trl-sipo audit weights` finds, as `--timestep_range`.",
        "",
        f"| question | in the paper | runs | {' | '.join(measured)} |",
        "|---" * (3 + len(measured)) + "|",
    ]
    for question, entry in questions.items():
        costs = {name: question_hours(models[name], question, found) for name, found in measured.items()}
        runs = next(iter(costs.values()))[0]
        hours = " | ".join(span(low, high) for _, low, high in costs.values())
        lines.append(f"| {entry['asks']} (`{question}`) | {entry['paper']} | {runs} | {hours} |")
    lines += ["", *_how_to_run(models)]
    return "\n".join(lines) + "\n"


def _how_to_run(models: dict[str, RealModel]) -> list[str]:
    """The last part of the page."""
    example = command_of(runs_of(models["sd15"], "ablation", 1)[1], "cache")
    return [
        "## How to run one",
        "",
        "Encode the data first (`trl-sipo encode`); `cache` below is its folder. Data that a sweep names beside them "
        "have its name behind theirs: `cache-own`, pairs that `trl-sipo feedback` made of the model's own samples and "
        "that were encoded like the others; `cache-exchanged-30`, the same pairs with the label of 30 % exchanged.",
        "",
        "```bash",
        "python benchmarks/paper/real_models.py --model sd15 --question ablation --dataset_name cache",
        "```",
        "",
        "prints one command for each run, such as, on each of two machines:",
        "",
        "```text",
        example,
        "```",
        "",
        "Then compare the runs with `trl-sipo evaluate`. Fewer seeds (`--seeds 1`) cost a third and have no interval.",
    ]


# ----------------------------------------------------------------------------------------------------------------- run


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=tuple(read_models()), help="print the commands of this model")
    add("--question", choices=tuple(read_questions()), help="of this question (default: all)")
    add("--dataset_name", default=DATA, help="the training data, encoded (default: %(default)s)")
    add("--seeds", type=int, default=SEEDS, help="runs of each arm (default: %(default)s)")
    add("--write", action="store_true", help="count the steps of all models, and write the report")
    return parser


def write() -> None:
    """Count all models, in some minutes, and write the report."""
    from tqdm.auto import tqdm

    models = read_models()
    measured = {name: measure_model(model) for name, model in tqdm(models.items(), desc="Models counted")}
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "real_models.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (REPORT / "real_models.md").write_text(page(measured), encoding="utf-8")
    print(f"Written: {REPORT / 'real_models.md'}")


def main(argv: list[str] | None = None) -> None:
    """List the sweeps, print commands, or write the report.

    Raises:
        ConfigurationError: A number of seeds that is none.
    """
    options = make_parser().parse_args(argv)
    if options.seeds < 1:
        raise ConfigurationError(f"`--seeds` must be at least 1, got {options.seeds}.")
    if options.write:
        write()
        return
    questions = read_questions()
    if options.model is None:
        for name, entry in questions.items():
            print(f"{name:<22}{len(entry['arms'])} arms  {entry['asks']}")
        return
    for question in [options.question] if options.question else questions:
        for run in runs_of(read_models()[options.model], question, options.seeds):
            print(f"# {question}, {run.arm}, seed {run.seed}\n{command_of(run, options.dataset_name)}")


if __name__ == "__main__":
    main()
