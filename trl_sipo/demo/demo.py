# SPDX-License-Identifier: Apache-2.0
"""The demo from beginning to end: pairs, runs in parallel, summary, figures, report. A stopped demo continues."""

import json
import logging
import multiprocessing
import os
import platform
import queue
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import datasets
import diffusers
import torch
import transformers
from pyarrow.parquet import read_metadata
from tqdm.auto import tqdm

from trl_sipo.demo.arm import DemoFiles, run_arm, write_json
from trl_sipo.demo.medium import Medium
from trl_sipo.demo.prepare import prepare_base, prepare_pairs, protocol_digest
from trl_sipo.demo.report import write_report
from trl_sipo.demo.settings import DemoSettings
from trl_sipo.demo.summary import aggregate, records, verdict
from trl_sipo.demo.verifier import TRAINING_SPLITS, load_verifiers
from trl_sipo.reporting.figures import check_plotting

# How often the progress bar is redrawn while waiting for the workers, in seconds.
POLL_SECONDS = 0.3


def run_demo(
    settings: DemoSettings, files: DemoFiles, medium: Medium, *, workers: int, command: str
) -> dict[str, Any]:
    """Run the demo and write `summary.json`, the figures and `report.html` into its folder.

    Runs that are already there for the same settings are kept, so that a demo that was stopped continues.

    Args:
        settings: The protocol.
        files: The demo's folder (made if it is missing) and its base model.
        medium: What that model draws.
        workers: Training processes at a time, one thread each.
        command: The command line, for the record.

    Returns:
        The summary, as written.
    """
    started = time.perf_counter()
    check_plotting()
    hush_libraries()
    files.root.mkdir(parents=True, exist_ok=True)
    base = prepare(settings, files, medium, workers)
    num_kept = train_all(settings, files, medium, workers)
    results = [json.loads(files.result(part.source, *run).read_text()) for part in settings.parts for run in part.runs]
    parts = {part.source: [run for run in results if run["source"] == part.source] for part in settings.parts}
    summary = {
        "command": command,
        "settings": asdict(settings),
        "environment": environment(),
        # Of this call; runs that were there already took theirs before.
        "seconds": round(time.perf_counter() - started, 1),
        "num_runs_kept": num_kept,
        "ceiling": ceiling(files),
        "base": base,
        "parts": {
            source: {
                "num_train_pairs": read_metadata(files.train_pairs(source)).num_rows,
                "num_held_out_pairs": read_metadata(files.held_out_pairs(source)).num_rows,
                "methods": aggregate(runs, base, medium),
                "runs": records(runs),
            }
            for source, runs in parts.items()
        },
    }
    summary["verdict"] = verdict(summary, medium)
    write_json(files.root / "summary.json", summary)
    print("Drawing the figures and the report")
    write_report(summary, parts, files, medium)
    return summary


def prepare(settings: DemoSettings, files: DemoFiles, medium: Medium, workers: int) -> dict[str, Any]:
    """The measures of the base; pairs and base are made unless they are there for the same protocol."""
    path, digest = files.root / "base.json", protocol_digest(settings, files)
    record = json.loads(path.read_text()) if path.is_file() else {}
    sources = [part.source for part in settings.parts]
    if record.get("protocol") == digest and all(files.held_out_pairs(source).is_file() for source in sources):
        return record
    if record and record["protocol"] != digest:
        print(f"{files.root} holds the results of another protocol; they are replaced.")
        for result in [*files.root.glob("runs/*/result.json"), *files.root.glob("pairs/*/*.parquet")]:
            result.unlink()
    torch.set_num_threads(workers)
    pipeline, verifiers = medium.load_pipeline(files.base_pipeline), load_verifiers(files.verifiers)
    print("Making preference pairs and ranking them by the verifier")
    for source in sources:
        prepare_pairs(pipeline, verifiers[0], settings, source, files, medium)
    print("Measuring the base model")
    record = {"protocol": digest, **prepare_base(pipeline, verifiers, settings, files, medium)}
    write_json(path, record)
    return record


def train_all(settings: DemoSettings, files: DemoFiles, medium: Medium, workers: int) -> int:
    """Train what is not there yet; returns the number of runs that were."""
    runs = [(part.source, *run) for part in settings.parts for run in part.runs]
    todo = [run for run in runs if not files.result(*run).is_file()]
    if not todo:
        return len(runs)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        steps = manager.Queue()
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker)
        bar = tqdm(
            total=len(todo) * settings.max_steps,
            unit="step",
            desc=f"Training {len(todo)} runs, {workers} at a time",
            smoothing=0.05,
        )
        try:
            futures = [pool.submit(_work, *run, settings, files, medium, steps) for run in todo]
            _wait(futures, steps, bar)
        except BaseException:
            # Includes Ctrl-C: workers ignore it, so that it is the parent that ends them.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)
    return len(runs) - len(todo)


def _wait(futures: list[Future], steps: Any, bar: tqdm) -> None:
    """Move the bar until all runs are done; the first error of a worker is raised at once."""
    while True:
        pending = [future for future in futures if not future.done()]
        try:
            while True:
                bar.update(steps.get(timeout=POLL_SECONDS if pending else 0.0))
        except queue.Empty:
            pass
        for future in futures:
            if future.done():
                future.result()
        if not pending:
            return


def prepare_worker() -> None:
    """One thread and no chatter per training process; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    hush_libraries()


def hush_libraries() -> None:
    """No progress bars of loading and writing small files: the demo has one bar of its own."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def _work(
    source: str, arm: str, seed: int, settings: DemoSettings, files: DemoFiles, medium: Medium, steps: Any
) -> None:
    report: Callable[[int], None] = steps.put
    log = files.run_directory(source, arm, seed) / "output.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    # What a run prints goes to its folder; on the screen it would break the progress bar.
    with open(log, "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        run_arm(source, arm, seed, settings, files, medium, report)


def ceiling(files: DemoFiles) -> dict[str, Any]:
    """The verifiers' own accuracies on real test media, as they are and after the autoencoder."""
    log = json.loads(files.training_log.read_text())
    return {name: log["verifiers"][name]["accuracy_on_real_test_photographs"] for name in TRAINING_SPLITS}


def environment() -> dict[str, Any]:
    packages = ("trl-sipo", "trl", "torch", "diffusers", "transformers")
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        **{name: version(name) for name in packages},
    }
