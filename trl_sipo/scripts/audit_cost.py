# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit cost <training command>`: memory, time and disk of a run, before it is run.

The model is built without weights, and a step of it runs without data. What real machines make of that is assumed, or
with `--measure` measured here.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import ArgumentParser
from trl_sipo.scripts.audit_report import (
    prepare_output,
    print_sentences,
    print_tables,
    recorded_command,
    write_audit,
)
from trl_sipo.trainer.methods import METHODS

if TYPE_CHECKING:
    from trl_sipo.cost.devices import Device
    from trl_sipo.cost.duration import Seconds
    from trl_sipo.cost.estimate import Estimate, RunPlan
    from trl_sipo.cost.models import Model
    from trl_sipo.cost.step import StepCounts, StepPlan
    from trl_sipo.reporting.evaluation_tables import Table
    from trl_sipo.scripts.cost_plan import Around, TrainingCommand

STRATEGIES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")


def make_parser(prog: str = "trl-sipo audit cost") -> argparse.ArgumentParser:
    """Its own options, then the training command as it would be typed after `trl-sipo`."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [options] METHOD [options of `trl-sipo METHOD`]",
        description="Estimate memory, time and disk of a training command, for this machine and for named GPUs. No "
        "weights are loaded, and the data are not read.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpu", action="append", metavar="NAME", help="a GPU to estimate for; may be repeated (default: all known)")
    add("--num_processes", type=int, default=1, help="GPUs that train together (default: %(default)s)")
    add("--strategy", choices=STRATEGIES, default="DDP", help="of many GPUs (default: %(default)s)")
    add("--network", type=float, default=25.0, metavar="GB/S", help="between machines, per GPU (default: %(default)s)")
    add("--cached", action="store_true", help="the data are encoded (`trl-sipo encode`); seen by itself of a cache")
    add("--num_pairs", type=int, help="of the training data: for its place on disk, and for --num_train_epochs")
    add("--num_prompts", type=int, help="different ones among the pairs (default: as many)")
    add("--price", type=float, metavar="AMOUNT", help="of a GPU-hour, in any currency")
    add("--measure", action="store_true", help="measure this machine: products, copies, forward passes of the model")
    add("--output", type=Path, metavar="DIR", help="folder for cost.json, cost.html and cost.png")
    add("method", choices=tuple(METHODS), metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    add("training", nargs=argparse.REMAINDER, help="options of the method, such as --config or --max_steps")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] for a number that is none of its kind, or a GPU that is not known."""
    from trl_sipo.cost.devices import find_gpu

    for name in ("num_processes", "num_pairs", "num_prompts"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= 10**12:
            raise ConfigurationError(f"`--{name}` must be at least 1 (and at most 10^12), got {value}.")
    for name in ("price", "network"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigurationError(f"`--{name}` must be a positive number, got {value}.")
    for name in options.gpu or ():
        find_gpu(name)


# -------------------------------------------------------------------------------------------------------- estimating


class Counter:
    """Counts steps of a model, each plan once, and shows that it is at work.

    Args:
        model: Whose steps.
    """

    def __init__(self, model: "Model"):
        from tqdm.auto import tqdm

        self.model = model
        self._found: dict[StepPlan, StepCounts] = {}
        self._progress = tqdm(desc="Steps counted without weights", unit=" step", leave=False)

    def __call__(self, plan: "StepPlan") -> "StepCounts":
        """The counts of a plan.

        Raises:
            ConfigurationError: No such step can be made: numbers beyond all memory, or a LoRA that fits no layer.
        """
        from trl_sipo.cost.step import count

        if plan not in self._found:
            try:
                self._found[plan] = count(self.model, plan)
            except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
                raise ConfigurationError(
                    f"A step of these settings cannot be made, even without data: {error}. Look at `resolution`, "
                    "`num_frames`, `per_device_train_batch_size`, `lora_r` and `lora_target_modules`."
                ) from error
            self._progress.update()
        return self._found[plan]

    def close(self) -> None:
        """End the display."""
        self._progress.close()


@dataclass(frozen=True)
class Row:
    """One device of the report.

    Attributes:
        estimate: The plan on it.
        advice: Settings after which it would fit, together; empty where it fits or none was sought; `None`: none of
            those known help.
        advised: The plan with them, on it; `None` as `advice`.
    """

    estimate: "Estimate"
    advice: list[str] | None
    advised: "Estimate | None"

    @property
    def timed(self) -> "Estimate | None":
        """What can be run: the plan, or the advised one."""
        return self.estimate if self.estimate.fits else self.advised


def rows_of(run: "RunPlan", devices: Sequence["Device"], counter: Counter, *, advises: bool = True) -> list[Row]:
    """The estimates, with advice where the plan does not fit."""
    from trl_sipo.cost.estimate import estimate, first_that_fits

    rows = []
    for device in devices:
        plan = estimate(counter(run.step), run, device)
        if plan.fits or not advises:
            rows.append(Row(plan, [], None))
            continue
        found = first_that_fits(run, device, counter)
        if found is None:
            rows.append(Row(plan, None, None))
        else:
            words, changed = found
            rows.append(Row(plan, words, estimate(counter(changed.step), changed, device)))
    return rows


def local_machine(run: "RunPlan", counter: Counter, *, measures: bool) -> "Device":
    """This machine; with its rates where they are measured.

    Raises:
        ConfigurationError: The model does not fit into its memory.
    """
    from tqdm.auto import tqdm

    from trl_sipo.cost.duration import computing
    from trl_sipo.cost.measuring import forward_seconds, measured_machine, unmeasured_machine

    if not measures:
        return unmeasured_machine()
    with tqdm(total=4, desc="Forward passes of this machine", leave=False) as progress:
        device = measured_machine()
        plan, architecture = run.step, counter.model.architecture
        seconds = forward_seconds(architecture, plan.samples, plan.precision, progress=progress.update)
    expected = computing(counter(plan).reference, device, allows_tf32=run.allows_tf32).middle
    return replace(device, calibration=seconds / expected)


# ------------------------------------------------------------------------------------------------------------ tables


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.1f}"


def span(seconds: "Seconds | None", unit: float = 1.0) -> str:
    """A range in a unit of so many seconds, in three digits."""
    return "-" if seconds is None else f"{seconds.low / unit:.3g} to {seconds.high / unit:.3g}"


def device_table(rows: Sequence[Row], run: "RunPlan", price: float | None) -> "Table":
    """One row per device."""
    from trl_sipo.reporting.evaluation_tables import Table

    header = ["GPU", "needs", "has", "fits", "s/step", "hours", "GPU-hours"] + (["price"] if price else [])
    cells = []
    for row in rows:
        timed = row.timed
        hours = None if timed is None else timed.run
        gpu_hours = None if hours is None else hours * run.processes
        cells.append(
            [
                row.estimate.device,
                gib(row.estimate.peak),
                gib(row.estimate.room),
                "yes"
                if row.estimate.fits
                else "no"
                if row.advised is None
                else f"no; {gib(row.advised.peak)} as below",
                span(None if timed is None else timed.step),
                span(hours, 3600),
                span(gpu_hours, 3600),
                *([span(None if gpu_hours is None else gpu_hours * price, 3600)] if price else []),
            ]
        )
    note = (
        f"GiB at the peak of a step, and {run.steps} steps of {run.pairs_per_step} pairs on {run.processes} "
        f"{'GPU' if run.processes == 1 else f'GPUs ({run.strategy})'}. From used well to used badly; of what does not "
        "fit, with the changes below. Evaluation, loading and saving are not in it."
    )
    return Table("What it costs on", note, header, cells)


def advice_lines(rows: Sequence[Row]) -> list[str]:
    """What would have to change, devices of the same advice together."""
    named: dict[str, list[str]] = {}
    for row in rows:
        if row.advice is None:
            words = "none of the settings known here is enough: lower `resolution` or `num_frames`, or take more GPUs"
        else:
            words = "; ".join(row.advice)
        if words:
            named.setdefault(words, []).append(row.estimate.device)
    notes = [f"{row.estimate.device} {row.estimate.note}." for row in rows if row.estimate.note]
    return [f"To fit on {', '.join(names)}: {words}." for words, names in named.items()] + notes


def part_table(title: str, parts: dict[str, float], note: str) -> "Table":
    """Bytes by what they are for."""
    from trl_sipo.reporting.evaluation_tables import Table

    rows = [[name, f"{size / 2**30:.2f}"] for name, size in parts.items()]
    return Table(title, note, ["part", "GiB"], [*rows, ["together", f"{sum(parts.values()) / 2**30:.2f}"]])


def known_sentences(model: "Model", run: "RunPlan", counts: "StepCounts", local: "Device") -> list[str]:
    """What was computed, what was assumed, and what was measured."""
    from trl_sipo.cost.devices import FAST, SLOW
    from trl_sipo.cost.operations import total_flops

    architecture, plan = model.architecture, run.step
    height, width, frames = architecture.size
    clip = f", {frames} frames" if frames > 1 else ""
    trained = "all weights" if plan.lora_rank is None else f"a LoRA of rank {plan.lora_rank}"
    call = total_flops(counts.policy) + (total_flops(counts.reference) if plan.has_reference else 0)
    computed = (
        f"Computed: {model.name} ({model.source}), {counts.parameters / 1e9:.2f} B parameters, {trained} "
        f"({counts.trained / 1e6:.1f} M), {plan.precision}, {width}x{height}{clip}, {plan.samples} samples a call; "
        f"{call / 1e12:.3g} TFLOP a call in {counts.policy.total()} operations, {run.accumulation} calls a step."
    )
    shares = ", ".join(f"{kind} {FAST.shares[kind]:.0%} to {SLOW.shares[kind]:.0%}" for kind in FAST.shares)
    assumed = (
        f"Assumed of GPUs, of their published rates: {shares}, memory {FAST.bandwidth:.0%} to {SLOW.bandwidth:.0%}; "
        f"{1e6 * FAST.launch:.0f} to {1e6 * SLOW.launch:.0f} microseconds to start an operation, fused attention, and "
        "2 GiB for the context and fragmentation. No GPU was measured."
    )
    if local.calibration is None:
        return [computed, assumed, "Measured: nothing; `--measure` measures this machine."]
    rates = f"{local.single / 1e9:.0f} GFLOP/s in float32, {local.bandwidth / 1e9:.1f} GB/s"
    measured = (
        f"Measured: {local.name}, {rates}; a forward pass takes {local.calibration:.2f} of what is computed from "
        "them, by which its times are scaled."
    )
    return [computed, assumed, measured]


# ------------------------------------------------------------------------------------------------------------ run


def run(command: str, argv: list[str]) -> None:
    """Count, estimate, print, and write when asked to."""
    options = make_parser(f"trl-sipo {command}").parse_args(argv)
    check_options(options)
    draws = prepare_output(options.output)
    from trl_sipo.scripts.cost_plan import find_cached_pairs, parse_command

    training = parse_command(options.method, options.training)
    audit(options, training, around_of(options, find_cached_pairs(training)), recorded_command(command, argv), draws)


def around_of(options: argparse.Namespace, cached_pairs: int | None) -> "Around":
    """What the options say beside the training command."""
    from trl_sipo.scripts.cost_plan import Around

    return Around(
        processes=options.num_processes,
        strategy=options.strategy,
        pairs=options.num_pairs or cached_pairs,
        prompts=options.num_prompts,
        is_cached=options.cached or cached_pairs is not None,
        network=1e9 * options.network,
    )


def local_plan(run: "RunPlan", command: "TrainingCommand") -> "RunPlan":
    """The plan on this machine: without a GPU one process, and float32 where nothing else is asked for."""
    import torch

    if torch.cuda.is_available():
        return run
    alone = replace(run, processes=1, accumulation=run.accumulation * run.processes)
    if command.names_precision:
        return alone
    return replace(alone, step=replace(run.step, precision="float32", frozen_precision="float32"))


def audit(
    options: argparse.Namespace, training: "TrainingCommand", around: "Around", command: str, draws: bool
) -> None:
    """Estimate, print, and write when asked to."""
    from trl_sipo.cost.devices import GPUS, find_gpu
    from trl_sipo.cost.disk import disk_parts
    from trl_sipo.cost.models import find_model
    from trl_sipo.scripts.cost_plan import make_plan, size_of

    model = find_model(training.model.model_name_or_path, size_of(training), revision=training.model.model_revision)
    plan = make_plan(training, model, around)
    here = local_plan(plan, training)
    counter = Counter(model)
    try:
        local = local_machine(here, counter, measures=options.measure)
        gpus = [find_gpu(name) for name in options.gpu] if options.gpu else list(GPUS.values())
        rows = [*rows_of(here, [local], counter, advises=False), *rows_of(plan, gpus, counter)]
        counts = counter(plan.step)
    finally:
        counter.close()
    disk = disk_parts(counts, plan.step, plan.disk, model.architecture.size)
    memory = rows[-1].estimate.memory
    tables = [
        device_table(rows, plan, options.price),
        part_table("Memory at the peak of a step, on each GPU", memory, ""),
        part_table("Disk", disk, disk_note(disk, training)),
    ]
    sentences = [*known_sentences(model, plan, counts, local), *advice_lines(rows)]
    print_sentences(sentences)
    print_tables(tables)
    if options.output is not None:
        report = report_of(training, around, plan, counts, rows, disk, local)
        report = {"command": command, **report, "price": options.price, "reading": sentences}
        figures = (
            {"cost": (figure_of(rows, memory), "What a step needs, and how long the run takes.")} if draws else {}
        )
        write_audit(options.output, "cost", report, sentences, tables, figures)


def disk_note(disk: dict[str, float], training: "TrainingCommand") -> str:
    """What it is made of, and whether there is room."""
    folder = Path(training.training.output_dir).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, sum(disk.values())
    room = "enough" if needed <= free else "TOO LITTLE"
    return (
        "Caches if the data are encoded, prompts at full length; checkpoints as many as there are at a time. Where "
        f"`output_dir` lies, {gib(free)} GiB are free: {room}."
    )


def report_of(
    training: "TrainingCommand", around: "Around", run: "RunPlan", counts: "StepCounts", rows: Sequence[Row],
    disk: dict[str, float], local: "Device",
) -> dict[str, Any]:  # fmt: skip
    """All numbers, as JSON takes them; bytes and seconds."""
    from trl_sipo.cost.devices import FAST, SLOW
    from trl_sipo.cost.operations import total_flops, total_traffic

    operations = {"policy": counts.policy, "reference": counts.reference, "encoding of a sample": counts.encoding}
    counted = {name: value for name, value in counts.to_json().items() if isinstance(value, int)}
    counted["operations"] = {
        name: {"flops": total_flops(found), "traffic": total_traffic(found), "number": found.total()}
        for name, found in operations.items()
    }
    return {
        "settings": {"method": training.method, "model": training.model.model_name_or_path, **asdict(around)},
        "plan": asdict(run),
        "computed": counted,
        "assumed": {"used well": asdict(FAST), "used badly": asdict(SLOW)},
        "measured": None if local.calibration is None else asdict(local),
        "disk": disk,
        "devices": [row_numbers(row, run) for row in rows],
    }


def row_numbers(row: Row, run: "RunPlan") -> dict[str, Any]:
    """One device of the report, as JSON takes it."""
    timed = row.timed
    seconds = None if timed is None or timed.run is None else timed.run
    return {
        "device": row.estimate.device,
        "memory": row.estimate.memory,
        "room": row.estimate.room,
        "fits": row.estimate.fits,
        "changes": row.advice,
        "memory_with_changes": None if row.advised is None else row.advised.memory,
        "step_seconds": None if timed is None or timed.step is None else asdict(timed.step),
        "run_seconds": None if seconds is None else asdict(seconds),
        "gpu_hours": None if seconds is None else asdict(seconds * (run.processes / 3600)),
    }


def figure_of(rows: Sequence[Row], memory: dict[str, float]) -> Any:
    """The parts of a step's memory beside what the devices have, and the hours of the run."""
    from trl_sipo.reporting.cost_figure import cost_figure

    size = 2**30
    hours = {
        row.estimate.device + ("" if row.estimate.fits else " *"): (
            row.timed.run.low / 3600,
            row.timed.run.high / 3600,
        )
        for row in rows
        if row.timed is not None and row.timed.run is not None
    }
    return cost_figure(
        {name: value / size for name, value in memory.items()},
        {row.estimate.device: row.estimate.room / size for row in rows},
        hours,
    )
