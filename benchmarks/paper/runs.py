# SPDX-License-Identifier: Apache-2.0
"""Training runs of the embedded model, each made once: a cache keyed by everything that a run depends on.

Questions that ask for the same run share it, and a command that was stopped goes on with what is missing. Two commands
may work in one folder at the same time.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from trl_sipo.demo.settings import Arm, DemoSettings
from trl_sipo.errors import StorageError


@dataclass(frozen=True)
class Run:
    """One training run; two equal ones are the same run.

    Attributes:
        method: Key of `trl_sipo.trainer.methods.METHODS`.
        overrides: Fields of the method's configuration that differ from the protocol's.
        source: Where the pairs come from, a key of `trl_sipo.demo.settings.SOURCES`.
        seed: Of the training: order of the pairs, noise levels, noise, and of the flipped labels.
        steps, eval_every: Optimiser steps, and steps between two measurements.
        flip_rate: Share of the training pairs whose arms are exchanged.
        random_mask: Whether the mask of each batch is dealt out to its pairs by chance: as many are kept, others.
    """

    method: str
    source: str
    seed: int
    steps: int
    eval_every: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    flip_rate: float = 0.0
    random_mask: bool = False

    def key(self, settings: DemoSettings, digest: str) -> str:
        """A hash of the run, of the protocol that it shares with others, and of the base model."""
        shared = {name: value for name, value in asdict(settings).items() if name not in ("parts", *_OF_THE_RUN)}
        content = json.dumps([asdict(self), shared, digest], sort_keys=True)
        return blake2b(content.encode(), digest_size=8).hexdigest()


_OF_THE_RUN = ("max_steps", "eval_every")


@dataclass(frozen=True)
class Workplace:
    """Where data and runs are kept, and what all runs share.

    Attributes:
        root: The folder; made if it is missing.
        settings: The protocol; `max_steps` and `eval_every` are those of each run.
        digest: Of the base model and the verifiers; empty before `prepared`.
    """

    root: Path
    settings: DemoSettings
    digest: str = ""

    @property
    def files(self) -> Any:
        """The data's and the base's places, a `DemoFiles`."""
        from trl_sipo.demo.arm import DemoFiles
        from trl_sipo.demo.images import IMAGES

        return DemoFiles(self.root / "data", IMAGES.base)

    @property
    def base(self) -> dict[str, Any]:
        """Measures of the base model, as `prepared` wrote them."""
        return json.loads((self.root / "base.json").read_text())

    def result(self, run: Run) -> Path:
        """The record of a finished run."""
        return self.root / "runs" / f"{run.key(self.settings, self.digest)}.json"

    def prepared(self, threads: int) -> "Workplace":
        """The same place with pairs, reference features and the base's measures there, made if they are missing."""
        import torch

        from trl_sipo.demo.demo import prepare
        from trl_sipo.demo.images import IMAGES
        from trl_sipo.demo.prepare import protocol_digest

        (self.root / "runs").mkdir(parents=True, exist_ok=True)
        files = self.files
        place = replace(self, digest=protocol_digest(self.settings, files))
        with FileLock(self.root / "data.lock"):
            prepare(self.settings, files, IMAGES, threads)
            known = self.root / "base.json"
            if not known.is_file() or place.base.get("digest") != place.digest:
                torch.set_num_threads(threads)
                place._measure_base(known)
        return place

    def _measure_base(self, path: Path) -> None:
        """Image by image, which the demo's own record of the base does not have."""
        from safetensors.torch import load_file

        from trl_sipo.demo.arm import measurement_prompts, write_json
        from trl_sipo.demo.images import IMAGES
        from trl_sipo.demo.verifier import load_verifiers

        files = self.files
        base = json.loads((files.root / "base.json").read_text())
        images = load_file(files.base_images)["images"].float() / 127.5 - 1
        prompts = measurement_prompts(self.settings, IMAGES)
        write_json(path, {**base, **judged(images, prompts, load_verifiers(files.verifiers)), "digest": self.digest})


def judged(samples: Any, prompts: Sequence[Any], verifiers: Sequence[Any]) -> dict[str, list[int]]:
    """Which images each verifier finds right, 1 or 0 in the order of the prompts: `correct`, `second_correct`."""
    from trl_sipo.demo.images import IMAGES

    names = ("correct", "second_correct")
    return {
        name: IMAGES.judge(verifier, samples, prompts)["correct"].int().tolist()
        for name, verifier in zip(names, verifiers, strict=True)
    }


def run_all(runs: Sequence[Run], place: Workplace, workers: int) -> list[dict[str, Any]]:
    """The records of runs, in their order; those that are not there yet are trained, several at a time.

    Args:
        runs: May name one run several times.
        place: A prepared one.
        workers: Training processes of one thread each; with one, it is this process.
    """
    todo = [run for run in unique(runs) if not place.result(run).is_file()]
    if todo:
        _train(todo, place, workers)
    return [json.loads(place.result(run).read_text()) for run in runs]


def unique(runs: Sequence[Run]) -> list[Run]:
    """Each run once, where it first comes."""
    return [run for position, run in enumerate(runs) if run not in runs[:position]]


def _train(todo: Sequence[Run], place: Workplace, workers: int) -> None:
    with tqdm(total=sum(run.steps for run in todo), unit="step", desc=f"{len(todo)} runs, {workers} at a time") as bar:
        if workers > 1:
            train_in_processes(make, todo, place, workers, lambda run: bar.update(run.steps))
            return
        for run in todo:
            make(run, place)
            bar.update(run.steps)


def train_in_processes(
    work: Callable[[Any, Any], None], todo: Sequence[Any], place: Any, workers: int, done: Callable[[Any], None]
) -> None:
    """Do the work of several runs at a time, each in a process of one thread.

    Args:
        work: Trains a run in a place; a function of a module.
        todo: The runs.
        place: Theirs.
        workers: Processes.
        done: Called with each run when it is finished.

    Raises:
        StorageError: A process was killed.
    """
    from trl_sipo.demo.demo import prepare_worker

    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker)
    try:
        jobs = {pool.submit(work, run, place): run for run in todo}
        for job in as_completed(jobs):
            job.result()
            done(jobs[job])
    except BrokenProcessPool as error:
        message = f"A training process was killed, most often for want of memory: take fewer --workers than {workers}."
        raise StorageError(f"{message} Finished runs are kept.") from error
    except BaseException:
        # Includes Ctrl-C: workers ignore it, so that it is the parent that ends them.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def make(run: Run, place: Workplace) -> None:
    """Train one run and write its record, unless another process has done so by then."""
    path = place.result(run)
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            return
        # What a run prints goes beside its record; on the screen it would break the progress bar.
        with open(path.with_suffix(".txt"), "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
            record = train(run, place)
        from trl_sipo.demo.arm import write_json

        write_json(path, record)


def train(run: Run, place: Workplace) -> dict[str, Any]:
    """Train and measure one run.

    Returns:
        `{"run", "records", "log", "seconds"}`: a record is one of the demo's `MeasureCallback` with the images that
        each verifier finds right and the held-out loss; `log` is what the trainer logs of training; seconds of the
        processor.
    """
    from transformers import PrinterCallback

    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.demo.arm import make_config
    from trl_sipo.demo.images import IMAGES
    from trl_sipo.trainer.methods import method_classes

    began = time.process_time()
    files = place.files
    settings = replace(place.settings, max_steps=run.steps, eval_every=run.eval_every)
    directory = place.result(run).with_suffix("")
    callback = _measure_callback(settings, files)
    trainer_class = method_classes(run.method)[1]
    trainer = (with_random_mask(trainer_class, run.seed) if run.random_mask else trainer_class)(
        IMAGES.load_pipeline(files.base_pipeline),
        args=make_config(Arm(run.method, run.method, dict(run.overrides)), run.seed, settings, IMAGES, directory),
        train_dataset=flipped(load_preference_dataset(str(files.train_pairs(run.source))), run.flip_rate, run.seed),
        eval_dataset=load_preference_dataset(str(files.held_out_pairs(run.source))),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    callback.pipeline = trainer.adapter.pipeline
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "run": asdict(run),
        "records": callback.records,
        "log": log,
        "seconds": time.process_time() - began,
    }


def _measure_callback(settings: DemoSettings, files: Any) -> Any:
    from trl_sipo.demo.arm import MeasureCallback
    from trl_sipo.demo.images import IMAGES

    class MeasureImages(MeasureCallback):
        """The demo's measures, and image by image what the verifiers say, for tests that pair by prompt."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            self.records[-1] |= judged(self.samples, self.prompts, self.verifiers)
            self.records[-1]["held_out_loss"] = metrics["eval_loss"]

    return MeasureImages(settings, files, IMAGES, lambda steps: None)


def with_random_mask(trainer_class: Any, seed: int) -> Any:
    """The trainer, keeping as many pairs of each batch as its mask would, but which ones by chance.

    The brake that the mask is stays; what it selects goes. A control for "masking helps because of what is masked".
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    class RandomMask(trainer_class):
        def mask_timesteps(self, pair_log_weight: torch.Tensor) -> torch.Tensor:
            """The method's mask with its entries in a random order, (batch,) bool."""
            keep = super().mask_timesteps(pair_log_weight)
            if not self.model.training:
                return keep
            return keep[torch.randperm(len(keep), generator=generator).to(keep.device)]

    return RandomMask


def flipped(pairs: Any, rate: float, seed: int) -> Any:
    """The pairs with the arms of `round(rate * n)` of them exchanged; which ones follows from the seed."""
    import datasets
    import torch

    if not rate:
        return pairs
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    wrong = set(order[: round(rate * len(pairs))].tolist())
    undecoded = pairs.cast_column("chosen", datasets.Image(decode=False))
    undecoded = undecoded.cast_column("rejected", datasets.Image(decode=False))
    arms = [
        (row["rejected"], row["chosen"]) if index in wrong else (row["chosen"], row["rejected"])
        for index, row in enumerate(undecoded)
    ]
    columns = {name: list(undecoded[name]) for name in undecoded.column_names}
    columns |= {"chosen": [arm[0] for arm in arms], "rejected": [arm[1] for arm in arms]}
    return datasets.Dataset.from_dict(columns, features=pairs.features)
