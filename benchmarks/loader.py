# SPDX-License-Identifier: Apache-2.0
"""How many pairs a second each kind of data gives, and how much of a training step that is.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --threads 1                # a CPU
    python benchmarks/loader.py --device cuda --model sd15 --dtype bf16 --pairs 1024 --workers 4 8

The same pairs of JPEG files from Parquet, from a folder of images, and from a stream are decoded, resized and collated
as for training, with and without worker processes; a bare loop that decodes and resizes files in memory is the floor.
The cache holds their latents, as `trl-sipo encode` writes them, and their embeddings. All readers take turns; each
pass but the first is counted, and the files lie in the system's page cache. The step is a bare one (`step_time.py`) at
the same size. Prints a table and writes JSON.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from random_pipelines import PIPELINES, make_pipeline
from records import add_common_options, processor_seconds, write_record
from step_variants import DTYPES, BareStep
from synthetic_pairs import BarePictures, rows, write_image_folder, write_parquet
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trl_sipo.cost.measuring import timed
from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.scripts import encode

FLOOR = "bare: decode, resize"
_FILES = 8  # of Parquet, which the workers of a stream share
IMAGE_MODELS = [name for name, parts in PIPELINES.items() if parts.size[2] == 1]


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=IMAGE_MODELS, default="41M", help="of the step (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="of the step (default: %(default)s)")
    add("--resolution", type=int, default=512, help="a side, in pixels (default: %(default)s)")
    add("--source-side", type=int, default=640, help="of the JPEG files, in pixels (default: %(default)s)")
    add("--pairs", type=int, default=32, help="default: %(default)s")
    add("--batch-size", type=int, default=4, help="pairs (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="beside 0 (default: 1 2)")
    add("--rounds", type=int, default=3, help="counted passes of each (default: %(default)s)")
    add_common_options(parser, "loader.json")
    return parser


def make_datasets(folder: Path, options: argparse.Namespace) -> dict[str, Dataset]:
    """The same pairs in each way there is to read them."""
    transform = PairedTransform(options.resolution)
    parquet = write_parquet(folder / "parquet", options.pairs, options.source_side, files=min(_FILES, options.pairs))
    images = write_image_folder(folder / "images", options.pairs, options.source_side)
    in_memory = [(row["chosen"], row["rejected"]) for row in rows(options.pairs, options.source_side)]
    stream = load_preference_dataset(str(parquet), streaming=True)
    return {
        FLOOR: BarePictures(in_memory, options.resolution),
        "Parquet": PreferenceDataset(load_preference_dataset(str(parquet)), transform=transform),
        "image folder": PreferenceDataset(load_preference_dataset(str(images)), transform=transform),
        "stream of Parquet": StreamingPreferenceDataset(stream, transform=transform),
        "cache": CachedPairs(write_cache(folder, parquet, options)),
    }


def write_cache(folder: Path, data: Path, options: argparse.Namespace) -> Path:
    """The pairs encoded by the command, with a VAE so small that it takes no time: shapes are those of the model."""
    parts = replace(PIPELINES[options.model], vae=PIPELINES["tiny"].vae, denoiser=PIPELINES["tiny"].denoiser)
    make_pipeline(parts).save_pretrained(folder / "model")
    size = ["--resolution", str(options.resolution), "--num_workers", "0", "--device", options.device]
    where = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(data)]
    encode.run("encode", [*where, "--output", str(folder / "cache"), *size])
    return folder / "cache"


def make_loader(dataset: Dataset, workers: int, options: argparse.Namespace) -> DataLoader:
    """As a trainer makes it: shuffled where that is possible."""
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        shuffle=not isinstance(dataset, IterableDataset),
        collate_fn=None if isinstance(dataset, BarePictures) else DataCollatorForDiffusionPreference(),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=options.device == "cuda",
    )


def measure(loaders: dict[str, DataLoader], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Pairs a second of each loader, and processor seconds a pair; the processor time of workers is not known."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for number in range(options.rounds + 1):
        for name, loader in loaders.items():
            began = time.perf_counter(), processor_seconds()
            pairs = sum(len(batch if isinstance(batch, torch.Tensor) else batch["pair_index"]) for batch in loader)
            assert pairs == options.pairs, f"{name} gave {pairs} pairs"
            if number:
                seconds[name].append((time.perf_counter() - began[0], processor_seconds() - began[1]))
    return {
        name: {
            "pairs_per_second": options.pairs / statistics.median(wall for wall, _ in values),
            "processor_seconds_per_pair": statistics.median(used for _, used in values) / options.pairs,
            "seconds": [wall for wall, _ in values],
        }
        for name, values in seconds.items()
    }


def step_seconds_per_pair(options: argparse.Namespace) -> float:
    """Of a bare training step at the same size, on latents."""
    pipeline = make_pipeline(PIPELINES[options.model], device=options.device, dtype=DTYPES[options.dtype])
    sized = argparse.Namespace(
        **{**vars(options), "size": (options.resolution, options.resolution, 1), "pairs": 1, "checkpointing": False}
    )
    step: Callable[[], None] = BareStep(pipeline, sized)
    step()
    return timed(step, options.device)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    options = make_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    step = step_seconds_per_pair(options)
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(StringIO()):
        datasets = make_datasets(Path(temporary), options)
        results = {}
        for workers in sorted({0, *options.workers}):
            loaders = {name: make_loader(dataset, workers, options) for name, dataset in datasets.items()}
            results[workers] = measure(loaders, options)
            del loaders  # with their workers
    shares = {name: share_of_step(results[0][name], step, options.device) for name in datasets}
    print(f"pairs a second: {options.source_side} px JPEG files, read at {options.resolution} px")
    print(
        f"{'workers':<24}"
        + "".join(f"{workers:>10}" for workers in results)
        + "  processor ms a pair  share of a step"
    )
    for name, share in shares.items():
        speeds = "".join(f"{result[name]['pairs_per_second']:10.1f}" for result in results.values())
        print(f"  {name:<22}{speeds}{1000 * results[0][name]['processor_seconds_per_pair']:21.2f}{share:17.2%}")
    print(f"The share is of reading without workers, so that nothing overlaps, in a step of {step:.3f} s a pair.")
    return write_record(options, {}, readers=results, step_seconds_per_pair=step, share_of_step=shares)


def share_of_step(result: dict[str, Any], step: float, device: str) -> float:
    """Of reading a pair in one step on it; in processor time on a CPU, as the step is measured."""
    read = result["processor_seconds_per_pair"] if device == "cpu" else 1 / result["pairs_per_second"]
    return read / step


if __name__ == "__main__":
    main()
