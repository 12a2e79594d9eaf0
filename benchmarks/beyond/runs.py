# SPDX-License-Identifier: Apache-2.0
"""Training runs of the frontier, each made once and kept; the rows that they give."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from beyond import protocol
from beyond.bases import BASES, folder_of
from beyond.candidates import CANDIDATES, CONSTANTS
from beyond.protocol import Arm, Cell
from filelock import FileLock
from paper.runs import flipped, train_in_processes
from tqdm.auto import tqdm

from trl_sipo.errors import ConfigurationError

#: Measures of a base, in the folder of its data.
BASE_RECORD = "frontier_base.json"
#: What `win_rate` counts, in words: part of what records share, so that another definition makes them anew.
WIN = "higher log probability by the second verifier; unlike starting noise, same prompt; ties one half"


def read_json(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        ConfigurationError: It is no whole JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        message = f"{path} is no whole JSON ({error}): delete it, and the command that wrote it makes it again."
        raise ConfigurationError(message) from error


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        cell: Where it belongs.
        arm: What is trained.
        seed: Order of the pairs, noise levels, noise, flipped labels and LoRA weights.
        measured_at: Steps after which it is measured; the last one ends it.
    """

    cell: Cell
    arm: Arm
    seed: int
    measured_at: tuple[int, ...] = protocol.MEASURED_AT

    @property
    def key(self) -> str:
        """A hash of all that is its own; what runs share is in `Place.shared`."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Place:
    """Where bases, data and runs are kept.

    Attributes:
        root: The folder.
        is_quick: Whether the runs are of the quick protocol.
    """

    root: Path
    is_quick: bool = False

    @property
    def settings(self) -> Any:
        """What all runs share."""
        return protocol.QUICK if self.is_quick else protocol.SETTINGS

    def files(self, base: str) -> Any:
        """Data of a base."""
        from trl_sipo.demo.arm import DemoFiles

        return DemoFiles(self.root / "data" / base, folder_of(BASES[base], self.root / "bases"))

    def result(self, run: Run) -> Path:
        """The record of a finished run."""
        return self.root / "runs" / f"{run.key}.json"

    def shared(self, run: Run) -> str:
        """A digest of what a run depends on beside itself: pairs, base, judges, rates, and what a win is.

        Raises:
            OSError: The base of the run was not prepared.
        """
        settings = {name: value for name, value in asdict(self.settings).items() if name != "parts"}
        content = {
            "settings": settings,
            "base": self.base_record(run.cell.base)["protocol"],
            "learning_rates": [protocol.LEARNING_RATE, protocol.LORA_RANK, protocol.LORA_LEARNING_RATE],
            "quick_rate": protocol.QUICK_RATE if self.is_quick else None,
            "candidate": CONSTANTS if run.arm.candidate else None,
            "win": WIN,
        }
        return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    def has(self, run: Run) -> bool:
        """Whether a run is finished; a record that was made with other shared settings is none."""
        path, base = self.result(run), self.root / "data" / run.cell.base / BASE_RECORD
        return path.is_file() and base.is_file() and read_json(path).get("shared") == self.shared(run)

    def base_record(self, base: str) -> dict[str, Any]:
        """The measures of a base, as `prepare` wrote them."""
        return read_json(self.root / "data" / base / BASE_RECORD)

    def prepare(self, bases: Iterable[str], threads: int) -> None:
        """Train bases, make pairs and measure the bases, as far as that is missing."""
        import torch

        from trl_sipo.demo.arm import write_json
        from trl_sipo.demo.demo import prepare
        from trl_sipo.demo.images import IMAGES

        (self.root / "runs").mkdir(parents=True, exist_ok=True)
        for base in bases:
            torch.set_num_threads(threads)
            with FileLock(self.root / f"{base}.lock"):
                files = self.files(base)
                measures = prepare(self.settings, files, IMAGES, threads)
                path = files.root / BASE_RECORD
                if not path.is_file() or read_json(path)["protocol"] != measures["protocol"]:
                    write_json(path, {**measures, "log_prob": _log_prob_of_base(self, files)})


def _log_prob_of_base(place: Place, files: Any) -> list[float]:
    """Of each image, by the verifier that ranks no pairs."""
    from safetensors.torch import load_file

    from trl_sipo.demo.arm import measurement_prompts
    from trl_sipo.demo.images import IMAGES
    from trl_sipo.demo.verifier import load_verifiers

    images = load_file(files.base_images)["images"].float() / 127.5 - 1
    judged = IMAGES.judge(load_verifiers(files.verifiers)[1], images, measurement_prompts(place.settings, IMAGES))
    return judged["log_prob"].tolist()


def run_all(runs: Sequence[Run], place: Place, workers: int) -> list[dict[str, Any]]:
    """The records of runs, in their order; those that are not there yet are trained, several at a time."""
    todo = [run for run in {run.key: run for run in runs}.values() if not place.has(run)]
    if todo:
        place.prepare(dict.fromkeys(run.cell.base for run in todo), workers)
        with tqdm(total=len(todo), unit="run", desc=f"{workers} at a time") as bar:
            train_in_processes(make, todo, place, workers, lambda run: bar.update())
    return [read_json(place.result(run)) for run in runs]


def make(run: Run, place: Place) -> None:
    """Train one run and write its record, unless another process has done so by then."""
    from trl_sipo.demo.arm import write_json

    path = place.result(run)
    with FileLock(path.with_suffix(".lock")):
        if place.has(run):
            return
        # What a run prints goes beside its record; on the screen it would break the progress bar.
        with open(path.with_suffix(".txt"), "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
            began = time.process_time()
            rows = train(run, place)
        seconds = round(time.process_time() - began, 1)
        record = {"run": asdict(run), "shared": place.shared(run), "rows": rows, "seconds": seconds}
        write_json(path, record)


def train(run: Run, place: Place) -> list[dict[str, Any]]:
    """Train and measure one run: one row per measurement."""
    from trl_sipo.demo.images import IMAGES

    files = place.files(run.cell.base)
    pipeline = IMAGES.load_pipeline(files.base_pipeline)
    rows: list[dict[str, Any]] = []
    pairs = _pairs(run, files)
    steps = list(run.measured_at)
    for number in range(run.arm.rounds):
        if number:
            pairs = _new_pairs(pipeline, run, place, files, number)
        first = number * len(steps) // run.arm.rounds
        part = steps[first : (number + 1) * len(steps) // run.arm.rounds]
        done = rows[-1]["step"] if rows else 0
        rows += _train_round(pipeline, run, place, files, pairs, [step - done for step in part], done)
    return rows


def _pairs(run: Run, files: Any) -> Any:
    from trl_sipo.data.loading import load_preference_dataset

    return flipped(load_preference_dataset(str(files.train_pairs(run.cell.source))), run.cell.flip_rate, run.seed)


def _new_pairs(pipeline: Any, run: Run, place: Place, files: Any, number: int) -> Any:
    """Pairs of the policy as it is, ranked as those of the base were."""
    from trl_sipo.demo.images import IMAGES
    from trl_sipo.demo.verifier import load_verifiers

    settings = replace(place.settings, data_seed=place.settings.data_seed + 10 * number + 100 * run.seed)
    modes = (pipeline.unet, pipeline.unet.training)
    pipeline.unet.eval()
    pairs = IMAGES.make_pairs(pipeline, load_verifiers(files.verifiers)[0], settings, "on_policy", held_out=False)
    modes[0].train(modes[1])
    return pairs


def _train_round(
    pipeline: Any, run: Run, place: Place, files: Any, pairs: Any, measured_at: Sequence[int], done: int
) -> list[dict[str, Any]]:
    from peft import LoraConfig
    from transformers import PrinterCallback

    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.demo.arm import make_config
    from trl_sipo.demo.images import IMAGES
    from trl_sipo.demo.settings import Arm as DemoArm
    from trl_sipo.trainer.methods import method_classes

    overrides, name = dict(run.arm.overrides), run.arm.trainer
    learning_rate = overrides.pop("learning_rate", protocol.LEARNING_RATE)
    if run.cell.is_lora:
        learning_rate *= protocol.LORA_LEARNING_RATE / protocol.LEARNING_RATE
    if place.is_quick:
        learning_rate *= protocol.QUICK_RATE
    settings = replace(place.settings, max_steps=measured_at[-1], eval_every=10**6, learning_rate=learning_rate)
    args = make_config(DemoArm(name, name, overrides), run.seed, settings, IMAGES, place.result(run).with_suffix(""))
    callback = _measuring(place, run, files, measured_at, done)
    trainer_class = method_classes(name)[1]
    if run.arm.candidate:
        trainer_class = CANDIDATES[run.arm.candidate](trainer_class)
    trainer = trainer_class(
        pipeline,
        args=args,
        train_dataset=pairs,
        eval_dataset=load_preference_dataset(str(files.held_out_pairs(run.cell.source))),
        callbacks=[callback],
        peft_config=LoraConfig(r=protocol.LORA_RANK, lora_alpha=protocol.LORA_RANK) if run.cell.is_lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    callback.pipeline = trainer.adapter.pipeline
    trainer.train()
    return callback.rows


#: Of the trainer's evaluation, under the names of the rows.
_HELD_OUT = {
    "eval_loss": "held_out_loss",
    "eval_rewards/accuracies": "held_out_accuracy",
    "eval_rewards/margins": "held_out_margin",
    "eval_drift/chosen_error": "held_out_chosen_drift",
}


def _measuring(place: Place, run: Run, files: Any, measured_at: Sequence[int], done: int) -> Any:
    from trl_sipo.demo.arm import MeasureCallback
    from trl_sipo.demo.images import IMAGES

    base = place.base_record(run.cell.base)["log_prob"]

    class Measure(MeasureCallback):
        """The demo's measures after some steps, and the win rate over the base."""

        def __init__(self) -> None:
            super().__init__(place.settings, files, IMAGES, lambda steps: None)
            self.rows: list[dict[str, Any]] = []

        def on_step_end(self, args, state, control, **kwargs):
            """Ask for a measurement where the protocol has one."""
            if state.global_step in measured_at:
                control.should_evaluate = True
            return control

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            """Sample, measure, and compare with the base image by image."""
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            scores = IMAGES.judge(self.verifiers[1], self.samples, self.prompts)["log_prob"].tolist()
            record = self.records[-1]
            names = ("accuracy", "second_accuracy", "reward", "frechet_distance", "diversity", "masked_share")
            self.rows.append(
                {
                    "step": done + record["step"],
                    "win_rate": win_rate(scores, base, place.settings.samples_per_prompt),
                    **{name: record[name] for name in names},
                    **{to: metrics[name] for name, to in _HELD_OUT.items() if name in metrics},
                    "log_prob": [round(score, 4) for score in scores],
                }
            )

    return Measure()


def win_rate(scores: Sequence[float], base: Sequence[float], per_prompt: int) -> float:
    """Chance that an image of the policy has a higher score than one of the base for the same prompt; ties one half.

    Images of the same starting noise are not compared: there, any change for the better would count as a full win,
    however small. The others are independent draws, as the closed form of the win rate has them.

    Args:
        scores, base: Of the images, prompt by prompt, each prompt's in the same order.
        per_prompt: Images of a prompt, at least 2.
    """
    wins = [
        (scores[first + i] > base[first + j]) + 0.5 * (scores[first + i] == base[first + j])
        for first in range(0, len(base), per_prompt)
        for i in range(per_prompt)
        for j in range(per_prompt)
        if i != j
    ]
    return sum(wins) / len(wins)


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One flat row per measurement, with what the run was."""
    rows = []
    for record in records:
        run = record["run"]
        about = {
            **run["cell"],
            "method": run["arm"]["method"],
            "setting": run["arm"]["label"],
            "seed": run["seed"],
        }
        rows += [{**about, **{name: row[name] for name in row if name != "log_prob"}} for row in record["rows"]]
    return rows
