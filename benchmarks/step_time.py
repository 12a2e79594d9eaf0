# SPDX-License-Identifier: Apache-2.0
"""What a training step costs beside a bare loop with the same network passes, and beside the step of others.

    python benchmarks/step_time.py --threads 1               # a CPU: a U-Net of 41 M parameters at 128 px, 4 pairs
    python benchmarks/step_time.py --device cuda --model sd15 --dtype bf16
    python benchmarks/step_time.py --device cuda --model sdxl --dtype bf16 --pairs 1
    python benchmarks/step_time.py --device cuda --model wan-1.3b --dtype bf16 --pairs 1 --checkpointing --rounds 3

The variants take turns, step by step, so that what disturbs the machine disturbs all of them; the ratios are of the
medians of one run. Weights are random and nothing is downloaded. A step is: the batch's forward passes, the backward
pass, clipping, the optimiser. Prints a table and writes JSON.

- `bare`: latents and embeddings at hand, one reference and one policy pass over both arms, the loss, nothing else.
- `bare, no reference`: the same without the reference pass, whose errors are given.
- `peer`: as the Diffusion-DPO example of diffusers is described: the bare loop, with images and prompts encoded in
  every step.
- the others: this library's trainers.

The share of the matrix rate is what a step computes a second (products of matrices, convolutions and attention, as
they are run), over what the device reaches in a product of two large matrices of the same dtype.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_pipelines import PIPELINES, make_pipeline
from records import Ratio, add_common_options, print_ratios, write_record
from step_counting import activation_bytes, count_flops, measure
from step_variants import DTYPES, IMAGES, TRAINERS, make_steps

from trl_sipo.cost.measuring import matrix_rate
from trl_sipo.trainer import reference_bank

# Ratio -> (numerator, denominator, target, whether it should be below)
TIME_RATIOS: dict[str, tuple[str, str, float | None, bool]] = {
    "step / bare loop": ("Diffusion-DPO", "bare", 1.03, True),
    "SIPO / bare loop": ("SIPO", "bare", 1.03, True),
    "DPO-C&M / bare loop": ("DPO-C&M", "bare", 1.03, True),
    "Poly-DPO / bare loop": ("Poly-DPO", "bare", 1.03, True),
    "SIPO / SIPO without run log": ("SIPO", "SIPO, no run log", 1.03, True),
    "precomputed / live reference": ("precomputed reference", "Diffusion-DPO", 0.72, True),
    "precomputed / live reference, SIPO": ("SIPO, precomputed reference", "SIPO", 0.72, True),
    "precomputed / bare without reference": ("precomputed reference", "bare, no reference", 1.03, True),
    "split / both arms at once, time": ("split arms", "Diffusion-DPO", None, True),
    "proximal term / none, time": ("proximal term", "Diffusion-DPO", 1.02, True),
    "proximal term / none, split arms, time": ("proximal term, split arms", "split arms", 1.02, True),
    "proximal term, stored predictions / live": ("proximal term, stored predictions", "proximal term", 0.72, True),
    "peer on the fly / ours on the fly": ("peer", IMAGES, None, False),
    "peer on the fly / ours cached": ("peer", "Diffusion-DPO", 1.25, False),
    "peer on the fly / ours precomputed": ("peer", "precomputed reference", 1.8, False),
}
# Ratio -> (numerator, denominator, target)
MEMORY_RATIOS: dict[str, tuple[str, str, float | None]] = {
    "step / bare loop, activations": ("Diffusion-DPO", "bare", None),
    "split / both arms at once, activations": ("split arms", "Diffusion-DPO", 0.60),
    "split / both arms at once, activations, SIPO": ("SIPO, split arms", "SIPO", 0.60),
    "proximal term / none, activations": ("proximal term", "Diffusion-DPO", 1.01),
    "proximal term / none, split arms, activations": ("proximal term, split arms", "split arms", 1.01),
}


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=PIPELINES, default="41M", help="with random weights (default: %(default)s)")
    add("--size", type=int, nargs="+", metavar="N", help="height and width, and frames of a video, in pixels")
    add("--dtype", choices=DTYPES, default="fp32", help="of frozen weights and of autocast (default: %(default)s)")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass, in all variants")
    add("--pairs", type=int, default=4, help="per step (default: %(default)s)")
    add("--rounds", type=int, default=6, help="counted steps of each variant (default: %(default)s)")
    add("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), metavar="NAME", help="default: all")
    add_common_options(parser, "step_time.json")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = make_parser()
    options = parser.parse_args(argv)
    settle_size(parser, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reference_bank.reference_folder = lambda: folder / "banks"
        pipeline = make_pipeline(PIPELINES[options.model], device=options.device, dtype=DTYPES[options.dtype])
        steps = make_steps(pipeline, options.trainers, options, folder)
        measure(steps, 1, options.device)  # the first step is not counted: it encodes the prompts, for all others
        flops = {name: count_flops(step) for name, step in steps.items()}
        rate = matrix_rate(DTYPES[options.dtype], options.device)
        seconds = measure(steps, options.rounds, options.device)
        measured = {name for over, under, _ in MEMORY_RATIOS.values() for name in (over, under)} & steps.keys()
        memory = {name: activation_bytes(steps[name], steps[name].model, options.device) for name in sorted(measured)}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shares = {name: flops[name] / medians[name] / rate for name in steps}
    base = steps["bare"].model
    parameters = sum(value.numel() for name, value in base.named_parameters() if "lora_" not in name)
    ratios = make_ratios(medians, memory)
    print(f"{options.model}, {parameters / 1e6:.1f} M parameters, {rate / 1e12:.3f} TFLOP/s in products of matrices")
    print_steps(seconds, flops, shares)
    print_ratios(ratios)
    return write_record(
        options,
        ratios,
        parameters=parameters,
        seconds=seconds,
        flops=flops,
        matrix_flops_per_second=rate,
        share_of_matrix_rate=shares,
        activation_bytes=memory,
    )


def settle_size(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Set `options.size` to height, width and frames; without it, to the model's own."""
    default = PIPELINES[options.model].size
    size = tuple(options.size or default)
    if len(size) == 2:
        size += default[2:]
    if len(size) != 3 or min(size) < 1:
        parser.error(f"--size takes a height and a width, and frames of a video; got {options.size}.")
    options.size = size


def make_ratios(medians: dict[str, float], memory: dict[str, int]) -> dict[str, Ratio]:
    """Those of which both sides were measured."""
    found = {
        name: Ratio(medians[over] / medians[under], target, below)
        for name, (over, under, target, below) in TIME_RATIOS.items()
        if {over, under} <= medians.keys()
    }
    for name, (over, under, target) in MEMORY_RATIOS.items():
        if {over, under} <= memory.keys():
            found[name] = Ratio(memory[over] / memory[under], target)
    return found


def print_steps(seconds: dict[str, list[float]], flops: dict[str, int], shares: dict[str, float]) -> None:
    """A line for each variant."""
    print(f"{'seconds a step':<50}{'median':>9}  {'range':<20}{'GFLOP':>9}  of the matrix rate")
    for name, values in seconds.items():
        spread = f"({min(values):.3f} .. {max(values):.3f})"
        median, gflop = statistics.median(values), flops[name] / 1e9
        print(f"  {name:<48}{median:9.3f}  {spread:<20}{gflop:9.1f}  {shares[name]:.0%}")


if __name__ == "__main__":
    main()
