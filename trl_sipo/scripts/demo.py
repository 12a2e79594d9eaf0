# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo demo`: watch Diffusion-DPO collapse and SIPO hold, or not, on this machine."""

import argparse
import os
import shlex
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import ArgumentParser


def make_parser(prog: str = "trl-sipo demo") -> argparse.ArgumentParser:
    """The command's options; what is not given comes from `trl_sipo.demo.settings`."""
    parser = ArgumentParser(
        prog=prog,
        description="Train a tiny Stable Diffusion with Diffusion-DPO, DPO-C&M, SIPO and Poly-DPO, and compare them. "
        "With --video: a tiny Wan, with Diffusion-DPO and SIPO. With --baselines: every method at one budget.",
    )
    parser.add_argument("--video", action="store_true", help="clips of moving clothes instead of images")
    parser.add_argument(
        "--baselines", action="store_true", help="every method at one budget, each with a strength chosen for it"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder (default: demo_output; with --video, demo_output/video; with --baselines, demo_output/baselines)",
    )
    parser.add_argument("--quick", action="store_true", help="two methods, one seed, about a minute")
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="methods to run; an unknown one lists them all; dpo@200 is dpo with a beta of 200",
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="training seeds")
    parser.add_argument("--beta", type=float, help="the matched beta (Diffusion-DPO convention)")
    parser.add_argument("--max-steps", type=int, help="training steps of each run")
    parser.add_argument("--workers", type=int, help="training processes at a time (default: one per CPU, at most 8)")
    parser.add_argument("--retrain", action="store_true", help="first train the base model and the verifiers anew")
    return parser


def settings_from(arguments: argparse.Namespace):
    """The protocol that the options ask for.

    Raises:
        ConfigurationError: An option out of range, or an unknown arm.
    """
    from dataclasses import replace

    from trl_sipo.demo.settings import FULL, QUICK, VIDEO_FULL, VIDEO_QUICK

    full, quick = (VIDEO_FULL, VIDEO_QUICK) if arguments.video else (FULL, QUICK)
    settings = quick if arguments.quick else full
    parts = tuple(
        replace(
            part,
            arms=tuple(arguments.arms) if arguments.arms else part.arms,
            seeds=tuple(arguments.seeds) if arguments.seeds else part.seeds,
        )
        for part in settings.parts
    )
    given = {"beta": arguments.beta, "max_steps": arguments.max_steps}
    return replace(settings, parts=parts, **{name: value for name, value in given.items() if value is not None})


def comparison_from(arguments: argparse.Namespace):
    """What `--baselines` compares, by the options.

    Raises:
        ConfigurationError: An unknown arm, or an option that says what the comparison finds out or has only once.
    """
    from dataclasses import replace

    from trl_sipo.demo.baselines import BASELINES

    for name, reason in {
        "video": "the methods are compared on images",
        "quick": "take fewer --arms, --seeds or --max-steps",
        "beta": "each method has a strength of its own",
    }.items():
        if getattr(arguments, name):
            raise ConfigurationError(f"--{name} does not go with --baselines: {reason}.")
    comparison = BASELINES
    if arguments.arms:
        comparison = comparison.with_arms(arguments.arms)
    if arguments.seeds:
        comparison = replace(comparison, seeds=tuple(arguments.seeds))
    if arguments.max_steps is not None:
        budget = replace(comparison.settings, max_steps=arguments.max_steps, eval_every=arguments.max_steps)
        comparison = replace(comparison, settings=budget)
    return comparison


def retrain(folder: Path, threads: int, *, video: bool = False) -> Path:
    """Train base and verifiers into `folder`, unless they are there; an interrupted training continues."""
    if not (folder / "training_log.json").is_file():
        module = import_module("trl_sipo.demo.video.pretrain" if video else "trl_sipo.demo.pretrain")
        module.main(["--output", str(folder), "--threads", str(threads), "--resume"])
    return folder


def run(command: str, argv: list[str]) -> None:
    """Run the demo and say where its results are."""
    arguments = make_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Inherited by the training processes: what transformers says while it is imported would break the progress bar.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    start = _protocol(arguments)
    workers = arguments.workers if arguments.workers is not None else min(os.cpu_count() or 1, 8)
    if workers < 1:
        raise ConfigurationError(f"--workers must be at least 1, got {workers}.")
    from trl_sipo.demo.arm import DemoFiles

    if arguments.video:
        from trl_sipo.demo.video.clips import CLIPS as medium
    else:
        from trl_sipo.demo.images import IMAGES as medium
    output = arguments.output or _default_output(arguments)
    base = retrain(output / "base", workers, video=arguments.video) if arguments.retrain else medium.base
    files = DemoFiles(output, base)
    summary = start(files, medium, workers=workers, command=shlex.join(["trl-sipo", command, *argv]))
    print()
    for part, sentences in summary["verdict"].items():
        print(f"{part.replace('_', '-')}:")
        for sentence in sentences:
            print(f"- {sentence}")
    kept = f" ({summary['num_runs_kept']} runs were there already)" if summary["num_runs_kept"] else ""
    print(f"\n{summary['seconds']:.0f} s{kept}. Open {output / 'report.html'}; numbers are in summary.json.")


def _protocol(arguments: argparse.Namespace) -> Callable[..., dict[str, Any]]:
    """What the options ask for, to be called with files and medium; what is wrong with them is said first."""
    if arguments.baselines:
        from trl_sipo.demo.baselines import run_baselines

        return partial(run_baselines, comparison_from(arguments))
    settings = settings_from(arguments)
    from trl_sipo.demo.demo import run_demo

    return partial(run_demo, settings)


def _default_output(arguments: argparse.Namespace) -> Path:
    output = Path("demo_output")
    kinds = [kind for kind in ("video", "baselines") if getattr(arguments, kind)]
    return output.joinpath(*kinds)
