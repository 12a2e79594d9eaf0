# SPDX-License-Identifier: Apache-2.0
"""How training scales with the number of processes, and what it sends over the network.

    python benchmarks/scaling.py                # CPUs, gloo: a U-Net of 41 M parameters, 1 and 2 processes
    python benchmarks/scaling.py --device cuda --processes 1 2 4 8 --model sd15
    python benchmarks/scaling.py --model-only   # the tables for up to 1,024 GPUs alone

Three parts. Throughput: real runs under torchrun, each process with its own pairs. Bytes: what those runs give to the
collectives in a step, beside what `trl_sipo/cost/communication.py` computes. Planning: the same arithmetic for the
published architectures, LoRA and full, on 8 to 1,024 GPUs. Weights are random and nothing is downloaded; prints tables
and writes JSON. On CPUs FSDP2 is Accelerate's own with one condition lifted (`cpu_fsdp.py`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cpu_fsdp import offer_fsdp_on_cpus
from memory import build
from random_pipelines import PIPELINES, make_pipeline
from step_variants import make_lora, make_pairs
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from trl_sipo.adapters.wrappers import repeated_blocks
from trl_sipo.cost.architectures import ARCHITECTURES
from trl_sipo.cost.communication import STRATEGIES, Workload, sent_per_step
from trl_sipo.scripts.env import environment
from trl_sipo.trainer.methods import method_classes

GPUS = (8, 64, 256, 1024)
RANK = 16
WARM_UP = 2  # steps that are not counted


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PIPELINES, default="41M", help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=4, help="per process and step (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="that are timed (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--model-only", action="store_true", help="compute the tables for planning, run nothing")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"), help="default: %(default)s")
    parser.add_argument("--worker", nargs=2, metavar=("STRATEGY", "KIND"), help=argparse.SUPPRESS)
    return parser


# ------------------------------------------------------------------------------------------------ one run, one process


class Meter(TrainerCallback):
    """Counts what each step gives to the collectives of its strategy, and how long it takes.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.steps: list[dict[str, float]] = []
        self._bytes: dict[str, float] = defaultdict(float)
        self._start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Stand between the engine and its collectives."""
        model = self.trainer.model_wrapped
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, self._all_reduce)
        if isinstance(model, FSDPModule):
            for name, purpose in (("all_gather_single", "weights"), ("reduce_scatter_single", "gradients")):
                setattr(dist, name, self._counted(purpose, getattr(dist, name)))

    def on_step_begin(self, args, state, control, **kwargs):
        """Set the counts to zero."""
        self._bytes.clear()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Keep the counts."""
        if self.trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps.append({"seconds": time.perf_counter() - self._start, **self._bytes})

    def _all_reduce(self, process_group, bucket):
        self._bytes["gradients"] += 2 * _share() * bucket.buffer().nbytes
        return allreduce_hook(process_group, bucket)

    def _counted(self, purpose: str, collective: Any) -> Any:
        """One of the two collectives of FSDP2, which nothing else calls."""

        def counted(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self._bytes[purpose] += _share() * max(tensor.nbytes for tensor in tensors)  # what is whole
            return collective(*args, **kwargs)

        return counted


def _share() -> float:
    return (dist.get_world_size() - 1) / dist.get_world_size()


def work(options: argparse.Namespace) -> None:
    """Train a few steps, and let the first process write what they took."""
    strategy, kind = options.worker
    if options.device == "cpu":
        torch.set_num_threads(1)
        if strategy == "FSDP2":
            offer_fsdp_on_cpus()
    config_class, trainer_class = method_classes("dpo")
    processes = int(os.environ["WORLD_SIZE"])
    pipeline, size = make_pipeline(PIPELINES[options.model]), PIPELINES[options.model].size
    rows = argparse.Namespace(pairs=options.pairs * processes * (options.steps + WARM_UP), size=size)
    trainer = trainer_class(
        pipeline,
        args=config_class(
            str(options.output.with_suffix("")),
            max_steps=options.steps + WARM_UP,
            per_device_train_batch_size=options.pairs,
            bf16=options.device == "cuda",
            gradient_checkpointing=False,
            use_cpu=options.device == "cpu",
            resolution=list(size[:2]),
            num_frames=size[2],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=make_pairs(pipeline, rows, of_images=False),
        peft_config=make_lora() if kind == "lora" else None,
    )
    parameters = _workload(trainer.model, weight_bytes=2 if options.device == "cuda" else 4)
    meter = Meter(trainer)
    trainer.add_callback(meter)
    trainer.train()
    if trainer.is_world_process_zero():
        options.output.write_text(json.dumps({"steps": meter.steps[WARM_UP:], "workload": vars(parameters)}))
    trainer.end()


def _workload(model: torch.nn.Module, weight_bytes: int) -> Workload:
    units = repeated_blocks(model)
    inside = {
        id(weight) for module in model.modules() if type(module).__name__ in units for weight in module.parameters()
    }
    weights = list(model.parameters())
    return Workload(
        parameters=sum(weight.numel() for weight in weights),
        trained=sum(weight.numel() for weight in weights if weight.requires_grad),
        outside=sum(weight.numel() for weight in weights if id(weight) not in inside),
        weight_bytes=weight_bytes,
        gradient_bytes=weight_bytes,
    )


# ------------------------------------------------------------------------------------------------------------ all runs


def launch(options: argparse.Namespace, strategy: str, kind: str, processes: int) -> dict[str, Any]:
    """One run under torchrun: its median step, and the bytes of one beside those computed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run.json")
        arguments = [f"--{name}={getattr(options, name)}" for name in ("model", "pairs", "steps", "device")]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment_of_run = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [*launcher, __file__, *arguments, "--output", str(output), "--worker", strategy, kind],
            env=environment_of_run,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        found = json.loads(output.read_text())
    seconds = sorted(step["seconds"] for step in found["steps"])
    last = found["steps"][-1]
    computed = sent_per_step(strategy, Workload(**found["workload"]), processes)
    return {
        "strategy": strategy,
        "kind": kind,
        "processes": processes,
        "seconds": seconds[len(seconds) // 2],
        "pairs_per_second": options.pairs * processes / seconds[len(seconds) // 2],
        "measured_bytes": sum(value for name, value in last.items() if name != "seconds"),
        "computed_bytes": sum(computed.values()),
    }


def planning() -> dict[str, Any]:
    """Bytes that a GPU sends in a step of one micro-batch in bf16, by model, kind of training, strategy and GPUs."""
    table: dict[str, Any] = {}
    for name, architecture in ARCHITECTURES.items():
        model = build(architecture, "meta", torch.bfloat16, RANK)
        lora = _workload(model, weight_bytes=2)
        own = lora.parameters - lora.trained
        full = Workload(own, own, lora.outside)
        table[name] = {
            kind: {
                strategy: {gpus: sum(sent_per_step(strategy, load, gpus).values()) for gpus in GPUS}
                for strategy in STRATEGIES
            }
            for kind, load in (("lora", lora), ("full", full))
        }
        table[name]["parameters"], table[name]["lora_parameters"] = own, lora.trained
    return table


def print_runs(runs: list[dict[str, Any]]) -> None:
    """Throughput and bytes of the runs, as a table."""
    print("| strategy | trains | processes | pairs/s | of one process x n | sent per step, MB: measured | computed |")
    print("|---|---|---|---|---|---|---|")
    alone = {run["kind"]: run["pairs_per_second"] for run in runs if run["processes"] == 1}
    for run in runs:
        efficiency = run["pairs_per_second"] / (run["processes"] * alone.get(run["kind"], float("nan")))
        print(
            f"| {run['strategy']} | {run['kind']} | {run['processes']} | {run['pairs_per_second']:.2f} | "
            f"{efficiency:.2f} | {run['measured_bytes'] / 1e6:.3f} | {run['computed_bytes'] / 1e6:.3f} |"
        )


def print_planning(table: dict[str, Any], gpus: int) -> None:
    """GB that each GPU sends in a step, as a table."""
    print(f"\nGB sent by each of {gpus:,} GPUs in a step of one micro-batch (bf16, reference computed in the step):\n")
    columns = [(kind, strategy) for kind in ("lora", "full") for strategy in STRATEGIES]
    print("| model | " + " | ".join(f"{kind}, {strategy}" for kind, strategy in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, model in table.items():
        cells = [f"{model[kind][strategy][gpus] / 1e9:.3g}" for kind, strategy in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Run, compute, print, write."""
    runs = []
    if not options.model_only:
        for kind in ("lora", "full"):
            for processes in options.processes:
                for strategy in ("DDP",) if processes == 1 else ("DDP", "FSDP2"):
                    runs.append(launch(options, strategy, kind, processes))
        print_runs(runs)
    table = planning()
    for gpus in (GPUS[0], GPUS[-1]):
        print_planning(table, gpus)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "worker")}
    result = {"settings": settings, "environment": environment(), "runs": runs, "planning": table}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    chosen = make_parser().parse_args()
    if chosen.worker:
        work(chosen)
    else:
        main(chosen)
