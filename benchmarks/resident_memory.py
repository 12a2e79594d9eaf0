# SPDX-License-Identifier: Apache-2.0
"""Whether reading or encoding more pairs takes more memory.

    OMP_NUM_THREADS=1 python benchmarks/resident_memory.py      # 1e3, 1e4 and 1e5 pairs of 32 px; about half an hour

For each number of pairs, each reader passes once over all of them in a process of its own, in a shuffled order as in
training (a stream in its own order), and `trl-sipo encode` encodes all of them. Then the process reads what the system
knows of it (Linux only):

- `own`: anonymous memory, which is the process's and nobody else's. A leak shows here.
- `resident`: all pages that are in memory for it. Pages of mapped files count here: they are the system's page
  cache, which it takes back when it needs room, and which all processes share.
- `peak`: the most that was resident at a time.

Growth is that of the largest number of pairs over the one before. Prints a table and writes JSON.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from random_pipelines import PIPELINES, make_pipeline
from records import Ratio, add_common_options, print_ratios, write_record
from synthetic_pairs import write_parquet
from torch.utils.data import DataLoader, Dataset

from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.scripts import encode

TARGET = 1.05
MIB = 2**20
BATCH_SIZE = 8
# Of a Parquet file: a larger dataset has more files, and a reader holds about one of them.
PAIRS_PER_FILE = 2500


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=int, nargs="+", default=[10**3, 10**4, 10**5], metavar="N", help="default: 1e3 1e4 1e5")
    add("--side", type=int, default=32, help="of the pictures, in pixels (default: %(default)s)")
    add("--pairs-per-prompt", type=int, default=10, help="default: %(default)s")
    add("--readers", nargs="+", choices=READERS, default=list(READERS), metavar="NAME", help="default: all")
    add("--folder", type=Path, help="for the data, about 12 KB a pair (default: the system's for temporary files)")
    add("--measure", metavar="NAME", help=argparse.SUPPRESS)  # in a process of its own
    add_common_options(parser, "resident_memory.json")
    return parser


# --------------------------------------------------------------------------------------- in a process of its own


def memory() -> dict[str, int]:
    """Bytes of this process: `own`, `resident` and `peak`."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = {"own": ("Anonymous", rollup), "resident": ("Rss", rollup), "peak": ("VmHWM", status)}
    return {
        name: 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1])
        for name, (field, text) in found.items()
    }


def run_encode(folder: Path, side: int) -> int:
    """The command; returns the number of pairs."""
    where = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data")]
    # Numbers of four bytes, and two of them for each, so that what is stored weighs against the rest.
    stored = ["--output", str(folder / "cache"), "--dtype", "float32", "--posterior_std", "--shard_mb", "8"]
    encode.run("encode", [*where, *stored, "--resolution", str(side), "--num_workers", "0", "--device", "cpu"])
    return len(CachedPairs(folder / "cache"))


def read_all(dataset: Dataset, *, shuffle: bool) -> int:
    """One pass; returns the number of pairs."""
    loader = DataLoader(
        dataset, BATCH_SIZE, shuffle=shuffle, collate_fn=DataCollatorForDiffusionPreference(), num_workers=0
    )
    return sum(len(batch["pair_index"]) for batch in loader)


def read_parquet(folder: Path, side: int) -> int:
    """Pictures from Parquet; returns the number of pairs."""
    rows = load_preference_dataset(str(folder / "data"))
    return read_all(PreferenceDataset(rows, transform=PairedTransform(side)), shuffle=True)


def read_stream(folder: Path, side: int) -> int:
    """The same as a stream; returns the number of pairs."""
    rows = load_preference_dataset(str(folder / "data"), streaming=True)
    return read_all(StreamingPreferenceDataset(rows, transform=PairedTransform(side)), shuffle=False)


def read_cache(folder: Path, side: int) -> int:
    """Latents and embeddings from the cache that the command wrote; returns the number of pairs."""
    return read_all(CachedPairs(folder / "cache"), shuffle=True)


# The command first: it writes the cache that is read.
READERS: dict[str, Callable[[Path, int], int]] = {
    "trl-sipo encode": run_encode,
    "cache": read_cache,
    "Parquet": read_parquet,
    "stream of Parquet": read_stream,
}


def measure_here(name: str, folder: Path, side: int) -> dict[str, Any]:
    """Run a reader and look at the memory of this process."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    with contextlib.redirect_stdout(StringIO()):
        pairs = READERS[name](folder, side)
    return {"pairs": pairs, "seconds": time.perf_counter() - began, **memory()}


# ------------------------------------------------------------------------------------------------- the comparison


def measure(name: str, pairs: int, folder: Path, side: int) -> dict[str, Any]:
    """What [`measure_here`] gives in a new process.

    Raises:
        RuntimeError: It failed, or read another number of pairs.
    """
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--side", str(side)]
    # The tables that `datasets` makes of Parquet go away with the data.
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "tables"), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} with {pairs} pairs failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    if result["pairs"] != pairs:
        raise RuntimeError(f"{name} gave {result['pairs']} of {pairs} pairs.")
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.measure:
        result = measure_here(options.measure, options.folder, options.side)
        print(json.dumps(result))
        return result
    if not Path("/proc/self/smaps_rollup").is_file():
        parser.error("this system has no /proc/self/smaps_rollup: the memory of a process is read on Linux only.")
    if "cache" in options.readers and "trl-sipo encode" not in options.readers:
        parser.error('--readers cache needs "trl-sipo encode" before it, which writes the cache.')
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in READERS if name in options.readers}
    print(f"{'MiB':<22}{'pairs':>8}{'own':>9}{'resident':>10}{'peak':>9}{'seconds':>9}")
    for pairs in sorted(options.pairs):
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary)
            make_pipeline(tiny_pipeline(options.side)).save_pretrained(folder / "model")
            write_parquet(
                folder / "data",
                pairs,
                options.side,
                pairs_per_prompt=options.pairs_per_prompt,
                files=-(-pairs // PAIRS_PER_FILE),
            )
            for name, by_pairs in results.items():
                by_pairs[pairs] = found = measure(name, pairs, folder, options.side)
                sizes = f"{found['own'] / MIB:9.1f}{found['resident'] / MIB:10.1f}{found['peak'] / MIB:9.1f}"
                print(f"  {name:<20}{pairs:>8}{sizes}{found['seconds']:9.1f}", flush=True)
    ratios = growth(results)
    print_ratios(ratios)
    return write_record(options, ratios, bytes=results)


def tiny_pipeline(side: int) -> Any:
    """A model that encodes so fast that a hundred thousand pairs take minutes."""
    return replace(PIPELINES["tiny"], size=(side, side, 1))


def growth(results: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Ratio]:
    """From the second largest number of pairs to the largest; the target is that of a process's own memory."""
    ratios = {}
    for name, by_pairs in results.items():
        *_, before, after = [{}, *by_pairs.values()]
        for kind, target in (("own", TARGET), ("resident", TARGET)):
            if before:
                ratios[f"{name}, {kind}"] = Ratio(after[kind] / before[kind], target)
    return ratios


if __name__ == "__main__":
    main()
