# SPDX-License-Identifier: Apache-2.0
"""How fast `trl-sipo encode` is beside a bare loop over the same pictures and prompts that stores nothing.

    OMP_NUM_THREADS=1 python benchmarks/encode_speed.py --threads 1      # a CPU: half of Stable Diffusion's VAE
    python benchmarks/encode_speed.py --device cuda --model sd15 --resolution 512 --pairs 512 --workers 8

The bare loop decodes and resizes JPEG files, and passes them through the VAE and the prompts through the text encoder,
with the same weights, precisions and batch sizes. The command does all that it does: it reads Parquet, checks, writes
shards and brings them to the disk. The two take turns; the ratios are of the medians of one run. What the command does
once (loading the model, fingerprints) is measured by the same command again, which finds its work done, and taken off.
Weights are random and nothing is downloaded. Prints a table and writes JSON.

- `each prompt once`: as many prompts as pairs.
- `shared prompts`: several pairs for each prompt, which the command encodes once, as the bare loop does; a loop that
  encodes the prompt of every pair is measured beside.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from random_pipelines import PIPELINES, make_pipeline
from records import Ratio, add_common_options, print_ratios, processor_seconds, write_record
from synthetic_pairs import ARMS, BarePictures, write_parquet
from torch.utils.data import DataLoader

from trl_sipo.adapters import adapter_for
from trl_sipo.data.cache.encode import TEXT_BATCH_SIZE
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.scripts import encode

TARGET = 0.95
MODELS = [name for name, parts in PIPELINES.items() if parts.pipeline == "StableDiffusionPipeline"]


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="41M", help="with random weights (default: %(default)s)")
    add("--resolution", type=int, default=256, help="a side, in pixels (default: %(default)s)")
    add("--source-side", type=int, default=512, help="of the JPEG files, in pixels (default: %(default)s)")
    add("--pairs", type=int, default=8, help="default: %(default)s")
    add("--pairs-per-prompt", type=int, default=4, help="of shared prompts (default: %(default)s)")
    add("--rounds", type=int, default=3, help="counted passes of each variant (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that read, for all variants (default: %(default)s)")
    add_common_options(parser, "encode_speed.json")
    return parser


class Encoding:
    """The command on one folder of pairs, into a new folder."""

    def __init__(self, model: Path, data: Path, output: Path, options: argparse.Namespace):
        self.output = output
        self.argv = [
            *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output", str(output)),
            *("--resolution", str(options.resolution), "--num_workers", str(options.workers)),
            *("--device", options.device),
        ]

    def __call__(self) -> None:
        """All of it."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.again()

    def again(self) -> None:
        """On what is encoded: loading the model and looking at the data, which takes the same for any number."""
        encode.run("encode", self.argv)


class BareLoop:
    """Decode, resize, VAE, text encoder; nothing is stored.

    Args:
        pipeline: Whose VAE and text encoder are used.
        data: Folder of Parquet files, read into memory.
        options: Of the script.
        each_prompt_once: Encode equal prompts once.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, data: Path, options: argparse.Namespace, *, each_prompt_once: bool
    ):
        rows = load_preference_dataset(str(data)).with_format("arrow")[:]
        files = [[cell["bytes"] for cell in rows[arm].to_pylist()] for arm in ARMS]
        self.pictures = BarePictures(list(zip(*files, strict=True)), options.resolution)
        self.prompts = rows["prompt"].to_pylist()
        if each_prompt_once:
            self.prompts = list(dict.fromkeys(self.prompts))
        self.pipeline, self.workers = pipeline, options.workers
        self.batch_size = adapter_for(pipeline).vae_slice_size

    @torch.no_grad()
    def __call__(self) -> None:
        """Encode all."""
        vae, text_encoder = self.pipeline.vae, self.pipeline.text_encoder
        for start in range(0, len(self.prompts), TEXT_BATCH_SIZE):
            texts = self.prompts[start : start + TEXT_BATCH_SIZE]
            embeds = self.pipeline.encode_prompt(
                texts, device=text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            embeds[0].to(torch.bfloat16).cpu()
        pinned = vae.device.type == "cuda"
        loader = DataLoader(self.pictures, self.batch_size, num_workers=self.workers, pin_memory=pinned)
        for pairs in loader:
            for pixels in pairs.unbind(1):
                latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
                (latents * vae.config.scaling_factor).to(torch.bfloat16).cpu()


def measure(variants: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant, in turns; processor seconds on a CPU. A first round of all is not counted."""
    clock = time.perf_counter if device == "cuda" else processor_seconds
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            began = clock()
            variant()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - began)
    return seconds


def make_variants(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The command on each kind of data, followed by the same command again, and the bare loops."""
    pipeline = make_pipeline(PIPELINES[options.model], device=options.device, dtype=torch.bfloat16)
    pipeline.save_pretrained(folder / "model")
    variants: dict[str, Callable[[], None]] = {}
    for case, shared in (("each prompt once", 1), ("shared prompts", options.pairs_per_prompt)):
        data = write_parquet(folder / case, options.pairs, options.source_side, pairs_per_prompt=shared)
        encoding = Encoding(folder / "model", data, folder / f"{case}, encoded", options)
        variants[f"encode, {case}"] = encoding
        variants[f"encode again, {case}"] = encoding.again
        variants[f"bare, {case}"] = BareLoop(pipeline, data, options, each_prompt_once=True)
    variants["bare, a prompt a pair"] = BareLoop(pipeline, data, options, each_prompt_once=False)
    return variants


def pairs_per_second(seconds: dict[str, list[float]], pairs: int) -> dict[str, float]:
    """Medians; of the command without what it does once, which the command on finished work tells."""
    speed = {}
    for name, values in seconds.items():
        if name.startswith("encode, "):
            starts = seconds[name.replace("encode", "encode again", 1)]
            values = [whole - start for whole, start in zip(values, starts, strict=True)]
        if not name.startswith("encode again"):
            speed[name] = pairs / statistics.median(values)
    return speed


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    options = make_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(StringIO()):
        seconds = measure(make_variants(Path(temporary), options), options.rounds, options.device)
    speed = pairs_per_second(seconds, options.pairs)
    ratios = {
        f"encode / bare, {case}": Ratio(speed[f"encode, {case}"] / speed[f"bare, {case}"], TARGET, below=False)
        for case in ("each prompt once", "shared prompts")
    }
    ratios["encode / bare, a prompt a pair"] = Ratio(speed["encode, shared prompts"] / speed["bare, a prompt a pair"])
    unit = "seconds" if options.device == "cuda" else "processor seconds"
    print(f"{options.pairs} pairs of {options.source_side} px, encoded at {options.resolution} px")
    for name, values in seconds.items():
        rate = f"{speed[name]:9.3f} pairs a second" if name in speed else ""
        print(f"  {name:<32}{min(values):7.2f} .. {max(values):.2f} {unit}{rate}")
    print_ratios(ratios)
    return write_record(options, ratios, pairs_per_second=speed, seconds=seconds)


if __name__ == "__main__":
    main()
