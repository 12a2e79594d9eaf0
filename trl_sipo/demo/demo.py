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
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
import transformers
from tqdm.auto import tqdm

from trl_sipo.demo.arm import DemoFiles, run_arm
from trl_sipo.demo.fashion import ASSETS
from trl_sipo.demo.model import load_pipeline_assets
from trl_sipo.demo.prepare import prepare, settings_digest
from trl_sipo.demo.report import write_report
from trl_sipo.demo.settings import ARMS, DemoSettings
from trl_sipo.demo.summary import aggregate, verdict
from trl_sipo.demo.verifier import TRAINING_SPLITS, load_verifiers

# How often the progress bar is redrawn while waiting for the workers, in seconds.
POLL_SECONDS = 0.3


def run_demo(settings: DemoSettings, output: Path, *, workers: int, command: str) -> dict[str, Any]:
    """Run the demo and write `summary.json`, the figures and `report.html` into `output`.

    Runs that are already there for the same settings are kept, so that a demo that was stopped continues.

    Args:
        settings: The protocol.
        output: Folder; made if it is missing.
        workers: Training processes at a time, one thread each.
        command: The command line, for the record.

    Returns:
        The summary, as written.
    """
    started = time.perf_counter()
    hush_libraries()
    files = DemoFiles(output)
    output.mkdir(parents=True, exist_ok=True)
    base = _base_record(settings, files, workers)
    _run_all(settings, files, workers)
    results = [json.loads((files.run_directory(*run) / "result.json").read_text()) for run in _runs(settings)]
    summary = {
        "command": command,
        "settings": asdict(settings),
        "environment": _environment(),
        "seconds": round(time.perf_counter() - started, 1),
        "ceiling": _ceiling(),
        "base": base,
        "methods": aggregate(results, base),
        "runs": [
            {"method": ARMS[run["arm"]].label, "arm": run["arm"], "seed": run["seed"], "steps": run["records"]}
            for run in results
        ],
    }
    summary["verdict"] = verdict(summary)
    _write_json(output / "summary.json", summary)
    print("Drawing the figures and the report")
    write_report(summary, results, files)
    return summary


def _runs(settings: DemoSettings) -> list[tuple[str, int]]:
    """Arm and seed of every run; seed by seed, so that a demo stopped early has all arms of the first seeds."""
    return [(arm, seed) for seed in settings.seeds for arm in settings.arms]


def _base_record(settings: DemoSettings, files: DemoFiles, workers: int) -> dict[str, Any]:
    path, digest = files.root / "data" / "base.json", settings_digest(settings)
    if path.is_file():
        record = json.loads(path.read_text())
        if record["settings"] == digest:
            return record
        print(f"{files.root} holds another demo's results; they are replaced.")
        for result in files.root.glob("runs/*/result.json"):
            result.unlink()
    torch.set_num_threads(workers)
    record = prepare(load_pipeline_assets(), load_verifiers(), settings, files, print)
    record["settings"] = digest
    _write_json(path, record)
    return record


def _run_all(settings: DemoSettings, files: DemoFiles, workers: int) -> None:
    todo = [run for run in _runs(settings) if not (files.run_directory(*run) / "result.json").is_file()]
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        steps = manager.Queue()
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
        bar = tqdm(
            total=len(todo) * settings.max_steps,
            unit="step",
            desc=f"Training {len(todo)} runs, {workers} at a time",
            smoothing=0.05,
        )
        try:
            futures = [pool.submit(_work, arm, seed, settings, str(files.root), steps) for arm, seed in todo]
            _wait(futures, steps, bar)
        except BaseException:
            # Includes Ctrl-C: workers ignore it, so that it is the parent that ends them.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)


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


def _prepare_worker() -> None:
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


def _work(arm: str, seed: int, settings: DemoSettings, root: str, steps: Any) -> None:
    report: Callable[[int], None] = steps.put
    log = DemoFiles(Path(root)).run_directory(arm, seed) / "output.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    # What a run prints goes to its folder; on the screen it would break the progress bar.
    with open(log, "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        run_arm(arm, seed, settings, root, report)


def _ceiling() -> dict[str, Any]:
    """The verifiers' own accuracies on real test images, as they are and after the autoencoder."""
    log = json.loads((ASSETS / "training_log.json").read_text())
    return {name: log["verifiers"][name]["accuracy_on_real_test_photographs"] for name in TRAINING_SPLITS}


def _environment() -> dict[str, Any]:
    packages = ("trl-sipo", "trl", "torch", "diffusers", "transformers")
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        **{name: version(name) for name in packages},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
