# SPDX-License-Identifier: Apache-2.0
"""How fast `trl-sipo encode` is beside a bare loop over the same pictures and prompts that stores nothing.

    OMP_NUM_THREADS=1 python benchmarks/encode_speed.py --threads 1      # a CPU: half of Stable Diffusion's VAE
    python benchmarks/encode_speed.py --device cuda --model sd15 --resolution 512 --pairs 512 --workers 8

The bare loop decodes and resizes JPEG files, and passes them through the VAE and the prompts through the text encoder,
with the same weights, precisions and batch sizes. The command does all that it does: it reads Parquet, checks, writes
shards and brings them to the disk. The two take turns; the ratios are of the medians of one run, and what the command
does once (loading the model, fingerprints) is told apart. Weights are random and nothing is downloaded. Prints a table
and writes JSON.

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
from random_pipelines import PIPELINES, make_pipeline
from records import Ratio, add_common_options, print_ratios, processor_seconds, write_record
from synthetic_pairs import ARMS, BarePictures, write_parquet
from torch.utils.data import DataLoader

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.cache.encode import TEXT_BATCH_SIZE, encode_pairs
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.scripts import encode

TARGET = 0.95
IMAGE_MODELS = [name for name, parts in PIPELINES.items() if parts.size[2] == 1]


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=IMAGE_MODELS, default="41M", help="with random weights (default: %(default)s)")
    add("--resolution", type=int, default=256, help="a side, in pixels (default: %(default)s)")
    add("--source-side", type=int, default=512, help="of the JPEG files, in pixels (default: %(default)s)")
    add("--pairs", type=int, default=16, help="default: %(default)s")
    add("--pairs-per-prompt", type=int, default=8, help="of shared prompts (default: %(default)s)")
    add("--rounds", type=int, default=3, help="counted passes of each variant (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that read, for all variants (default: %(default)s)")
    add_common_options(parser, "encode_speed.json")
    return parser


class Encoding:
    """The command on one folder of pairs, begun; a call is the part that grows with the data."""

    def __init__(self, model: Path, data: Path, folder: Path, options: argparse.Namespace):
        self.output = folder / "cache"
        self.arguments = encode.make_parser().parse_args(
            [
                *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output", str(self.output)),
                *("--resolution", str(options.resolution), "--num_workers", str(options.workers)),
                *("--device", options.device),
            ]
        )
        began = time.perf_counter()
        self.rows = encode.load_rows(self.arguments)
        self.adapter = encode.load_encoders(self.arguments)
        self.manifest = encode.make_manifest(self.arguments, self.adapter, self.rows)
        self.dataset = encode.make_dataset(self.rows, self.manifest)
        self.seconds_to_start = time.perf_counter() - began

    def __call__(self) -> None:
        """Encode into a new folder."""
        shutil.rmtree(self.output, ignore_errors=True)
        workers = self.arguments.num_workers
        encode_pairs(
            self.adapter,
            self.dataset,
            self.rows,
            self.manifest,
            self.output,
            num_workers=workers,
            show_progress=False,
        )


class BareLoop:
    """Decode, resize, VAE, text encoder; nothing is stored.

    Args:
        adapter: Whose VAE and text encoder are used.
        data: Folder of Parquet files, read into memory.
        options: Of the script.
        each_prompt_once: Encode equal prompts once.
    """

    def __init__(self, adapter: BackboneAdapter, data: Path, options: argparse.Namespace, *, each_prompt_once: bool):
        rows = load_preference_dataset(str(data)).with_format("arrow")[:]
        files = [[cell["bytes"] for cell in rows[arm].to_pylist()] for arm in ARMS]
        self.pictures = BarePictures(list(zip(*files, strict=True)), options.resolution)
        self.prompts = rows["prompt"].to_pylist()
        if each_prompt_once:
            self.prompts = list(dict.fromkeys(self.prompts))
        self.pipeline, self.batch_size, self.workers = adapter.pipeline, adapter.vae_slice_size, options.workers

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


def measure(
    variants: dict[str, Callable[[], None]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and processor seconds of each variant, in turns; a first round of all is not counted."""
    seconds, processor = ({name: [] for name in variants} for _ in range(2))
    for number in range(rounds + 1):
        for name, variant in variants.items():
            began = time.perf_counter(), processor_seconds()
            variant()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began[0])
                processor[name].append(processor_seconds() - began[1])
    return seconds, processor


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    options = make_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = {"each prompt once": 1, "shared prompts": options.pairs_per_prompt}
    variants: dict[str, Callable[[], None]] = {}
    starts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_pipeline(PIPELINES[options.model]).save_pretrained(folder / "model")
        for case, shared in cases.items():
            data = write_parquet(folder / case, options.pairs, options.source_side, pairs_per_prompt=shared)
            encoding = Encoding(folder / "model", data, folder, options)
            starts[case] = encoding.seconds_to_start
            variants[f"encode, {case}"] = encoding
            variants[f"bare, {case}"] = BareLoop(encoding.adapter, data, options, each_prompt_once=True)
        variants["bare, a prompt a pair"] = BareLoop(encoding.adapter, data, options, each_prompt_once=False)
        with redirect_stdout(StringIO()):
            seconds, processor = measure(variants, options.rounds, options.device)
    counted = seconds if options.device == "cuda" else processor
    speed = {name: options.pairs / statistics.median(values) for name, values in counted.items()}
    ratios = {
        f"encode / bare, pairs a second, {case}": Ratio(
            speed[f"encode, {case}"] / speed[f"bare, {case}"], TARGET, False
        )
        for case in cases
    }
    ratios["encode / bare, a prompt a pair"] = Ratio(speed["encode, shared prompts"] / speed["bare, a prompt a pair"])
    unit = "seconds" if options.device == "cuda" else "processor seconds"
    print(f"{options.pairs} pairs of {options.source_side} px, encoded at {options.resolution} px; pairs a second")
    for name, value in speed.items():
        spread = f"({min(counted[name]):.2f} .. {max(counted[name]):.2f} {unit})"
        print(f"  {name:<28}{value:9.3f}  {spread}")
    print(f"to start, once: {max(starts.values()):.1f} s")
    print_ratios(ratios)
    return write_record(
        options,
        ratios,
        pairs_per_second=speed,
        seconds=seconds,
        processor_seconds=processor,
        seconds_to_start=starts,
    )


if __name__ == "__main__":
    main()
