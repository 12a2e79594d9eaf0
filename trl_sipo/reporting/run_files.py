# SPDX-License-Identifier: Apache-2.0
"""What a training run left in its output folder: its log, its starts, its noise levels. Read while it may go on.

Nothing in the folder is trusted: files are read line by line, links that lead out are not followed, and what is not as
it must be is counted and said.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import compress, islice
from pathlib import Path
from typing import Any

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.printing import without_secrets
from trl_sipo.reporting.level_frames import ExactFrames, Frame, PooledFrames, read_levels
from trl_sipo.reporting.run_lines import JsonLines, as_number, as_step, file_inside, json_object
from trl_sipo.reporting.thinning import FEWEST_POINTS, Course, ThinnedLog
from trl_sipo.trainer.run_log import LEVELS, METRICS, RUN_LOG_FOLDER, STARTS
from trl_sipo.trainer.run_warnings import RunWarnings

HELD_OUT = "held out"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_METRIC = re.compile(r"(?:loss|grad_norm|learning_rate|kl|(?:rewards|logps|sipo|drift|proximal)/[\w./-]{1,60})")
_EVALUATED = re.compile(rf"eval_(?:(.{{1,60}})_)??({_METRIC.pattern})")
_SAMPLES = re.compile(r"samples/(.{1,100})", re.DOTALL)
_OF_TEXT = "sipo/chosen_importance_weight"
_MOST_STARTS = 100
_LEAST_POINTS = 20
_MOST_SPLITS = 8
# Of a run, over which its last training numbers are averaged; and the fewest logs, since one small batch says little.
_RECENT, _FEWEST_RECENT = 0.1, 5


@dataclass
class Run:
    """One run, as far as it has come.

    Attributes:
        folder: Its output folder.
        name: Short, and unlike those of the other runs.
        starts: Lines of `starts.jsonl`, the oldest first.
        train: Training logs.
        held_out: Logs of evaluations, by dataset.
        samples: Scores of sample grids.
        train_frames, eval_frames: By noise level.
        num_train_frames, num_eval_frames: How many were logged.
        warnings: What the trainer warned of, with the step.
        has_ended: Whether training came to its end.
        last_time: When the last row was logged, in seconds since the epoch; 0: not known.
        source: Files that the log was read from.
        demo_records: Measurements of the demo's samples, by step.
        notes: What could not be read.
    """

    folder: Path
    name: str
    starts: list[dict[str, Any]] = field(default_factory=list)
    train: ThinnedLog = field(default_factory=ThinnedLog)
    held_out: dict[str, ThinnedLog] = field(default_factory=dict)
    samples: ThinnedLog = field(default_factory=ThinnedLog)
    train_frames: list[Frame] = field(default_factory=list)
    eval_frames: list[Frame] = field(default_factory=list)
    num_train_frames: int = 0
    num_eval_frames: int = 0
    warnings: list[str] = field(default_factory=list)
    has_ended: bool = False
    last_time: float = 0.0
    source: str = ""
    demo_records: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def last_start(self) -> Mapping[str, Any]:
        """What the run was last started with; empty where it is not known."""
        return self.starts[-1] if self.starts else {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the last start."""
        found = self.last_start.get("settings")
        return found if isinstance(found, dict) else {}

    def setting(self, name: str) -> float | None:
        """A number among the last start's facts or settings."""
        value = as_number(self.last_start.get(name))
        return as_number(self.settings.get(name)) if value is None else value

    def text(self, name: str) -> str:
        """A text among the last start's facts; empty where it is not known."""
        value = self.last_start.get(name)
        return without_secrets(value) if isinstance(value, str) else ""

    @property
    def last_step(self) -> int:
        """The latest that anything was logged of."""
        logs = [self.train, self.samples, *self.held_out.values()]
        return int(max((log.last_step or 0 for log in logs), default=0))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been logged yet."""
        return not (self.train.num_rows or self.held_out or self.demo_records)

    def course(self, key: str, split: str | None = None) -> Course | None:
        """One metric over steps: of training, or of one dataset's evaluations."""
        log = self.train if split is None else self.held_out.get(split)
        return None if log is None else log.course(key)

    def last_held_out(self, key: str) -> float | None:
        """The last finite value of the first held-out dataset that has it."""
        courses = (self.course(key, split) for split in self.held_out)
        return next((course.finite[-1][1] for course in courses if course is not None and course.finite), None)

    def recent(self, key: str) -> float | None:
        """The mean of a training metric over the last tenth of the steps, and at least over the last five points."""
        course = self.course(key)
        values = course.finite if course is not None else []
        if not values:
            return None
        count = sum(step >= (1 - _RECENT) * values[-1][0] for step, _ in values)
        recent = [value for _, value in values[-max(count, _FEWEST_RECENT) :]]
        return sum(recent) / len(recent)


def read_runs(folders: Sequence[Path], *, may_be_new: bool = False) -> list[Run]:
    """Read runs, under names that tell them apart.

    Args:
        may_be_new: Whether a folder may be missing or empty, as that of a run that has not begun.

    Raises:
        ConfigurationError: A folder is not there, or holds no run; or runs of language models beside others.
        DatasetError: A file of a run is none.
    """
    points = max(_LEAST_POINTS, FEWEST_POINTS // len(folders))  # a page of many runs is no larger than one of few
    runs = [
        read_run(folder, name, may_be_new=may_be_new, points=points)
        for folder, name in zip(folders, _names(folders), strict=True)
    ]
    _check_alike(runs)
    return runs


def read_run(folder: Path, name: str, *, may_be_new: bool = False, points: int = FEWEST_POINTS) -> Run:
    """Read one run; see [`read_runs`].

    Args:
        points: That a long log is thinned to, at least.
    """
    run = Run(folder, name, train=ThinnedLog(points), samples=ThinnedLog(points))
    if folder.is_dir():
        for read in (_read_log, _read_checkpoint, _read_demo):
            read(run)
        has_pictures = any((folder / "samples").glob("step-*"))
    else:
        has_pictures = False
    if not run.source and not has_pictures and not may_be_new:
        raise ConfigurationError(_no_run(folder))
    return run


def _check_alike(runs: Sequence[Run]) -> None:
    """Language models have no noise levels, and their rewards are sums over tokens: nothing of theirs compares."""
    texts = [run.name for run in runs if _OF_TEXT in run.train.keys]
    others = [run.name for run in runs if run.train.num_rows and run.name not in texts]
    if texts and others:
        raise ConfigurationError(
            f"{texts[0]!r} trained a language model and {others[0]!r} a diffusion model, whose rewards are of other "
            "kinds. Write a report of each."
        )


def _names(folders: Sequence[Path]) -> list[str]:
    resolved = [folder.resolve() for folder in folders]
    twice = next((folder for folder in resolved if resolved.count(folder) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"The run {str(twice)!r} is given more than once. Give each run once.")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"There is no folder {str(folder)!r}. Give the output folder of a training run."
    if not folder.is_dir():
        return f"{str(folder)!r} is no folder. Give the output folder of a training run."
    if (folder / "evaluation.json").is_file():
        return (
            f"{str(folder)!r} is an output of `trl-sipo evaluate`, and no run. Give the run that it evaluated, and "
            f"`--evaluation {folder}`."
        )
    if (folder / RUN_LOG_FOLDER / METRICS).is_file():
        return (
            f"`{RUN_LOG_FOLDER}` of {str(folder)!r} is a link out of this folder, and is not followed. Give the run "
            "itself."
        )
    below = (path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/{RUN_LOG_FOLDER}/{METRICS}"))
    inside = [path.parent.parent for path in islice(below, 5)]
    hint = f" There are runs below it: {', '.join(map(str, inside))}." if inside else ""
    return (
        f"{str(folder)!r} holds no training run: no `{RUN_LOG_FOLDER}`, no checkpoint with `trainer_state.json`, and "
        f"no samples.{hint or ' Give the `output_dir` of one.'} With `--watch` a run may begin later."
    )


def _read_log(run: Run) -> None:
    lines = JsonLines(file_inside(run.folder, f"{RUN_LOG_FOLDER}/{STARTS}"))
    for start in lines:
        run.starts.append(start)
        if len(run.starts) > _MOST_STARTS:
            del run.starts[1]
    metrics = JsonLines(file_inside(run.folder, f"{RUN_LOG_FOLDER}/{METRICS}"))
    _take_rows(run, metrics)
    run.has_ended = run.has_ended and not _has_started_since(run)
    levels = JsonLines(file_inside(run.folder, f"{RUN_LOG_FOLDER}/{LEVELS}"))
    _take_levels(run, levels)
    if metrics.path is not None or lines.path is not None:
        run.source = RUN_LOG_FOLDER
    for part in (lines, metrics, levels):
        if part.num_broken:
            run.notes.append(f"{part.num_broken} line(s) of {part.path.name} could not be read.")  # type: ignore


def _has_started_since(run: Run) -> bool:
    """Whether a run that had ended was started again, and has logged nothing yet.

    A start drops what was logged after its step: an end at a later step is the end of what it started. Only of an end
    at its own step do the times tell, which a clock that was set may have wrong.
    """
    step = as_step(run.last_start.get("step"))
    return (step is None or step >= run.last_step) and _seconds(run.last_start.get("time")) > run.last_time


def _seconds(value: Any) -> float:
    """A time of ISO 8601 since the epoch; 0 of what is none."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _take_rows(run: Run, rows: Any) -> None:
    """Sort the numbers of logged rows."""
    warnings = RunWarnings()
    for row in rows:
        step = as_step(row.get("step"))
        if step is None:
            continue
        numbers = {key: number for key, value in row.items() if (number := as_number(value)) is not None}
        run.last_time = numbers.get("time", 0.0)
        # What is evaluated after the end leaves it the end; what is trained does not.
        run.has_ended = "train_runtime" in numbers or (run.has_ended and "loss" not in numbers)
        train, samples = {}, {}
        for key, number in numbers.items():
            if match := _EVALUATED.fullmatch(key):
                _add_held_out(run, match[1] or HELD_OUT, step, match[2], number)
            elif match := _SAMPLES.fullmatch(key):
                samples[match[1]] = number
            elif _METRIC.fullmatch(key):
                train[key] = number
        if train:
            run.train.add(step, train)
            run.warnings += warnings.look(step, train)
        if samples:
            run.samples.add(step, samples)
    disordered = run.train.num_disordered
    if disordered:
        run.notes.append(f"{disordered} log(s) of earlier steps after later ones were left out.")


def _add_held_out(run: Run, split: str, step: int, key: str, number: float) -> None:
    if "/time_" in key or (split not in run.held_out and len(run.held_out) >= _MOST_SPLITS):
        return
    run.held_out.setdefault(split, ThinnedLog(run.train.limit)).add(step, {key: number})


def _take_levels(run: Run, rows: Any) -> None:
    trained, evaluated = PooledFrames(), ExactFrames()
    first_evaluated = None
    for row in rows:
        step, split = as_step(row.get("step")), row.get("split")
        if step is None or not isinstance(split, str):
            continue
        if split == "train":
            trained.add(step, read_levels(row))
        elif first_evaluated in (None, split):  # of several datasets the first
            first_evaluated = split
            evaluated.add(step, read_levels(row))
    run.train_frames, run.num_train_frames = trained.frames, trained.num_seen
    run.eval_frames, run.num_eval_frames = (evaluated.frames, evaluated.num_seen) if evaluated.num_seen else ([], 0)


def _read_checkpoint(run: Run) -> None:
    """The log in the newest checkpoint, of a run that kept no other."""
    if run.source:
        return
    folders = sorted(
        (int(match[1]), path) for path in run.folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))
    )
    names = ["trainer_state.json", *(f"{path.name}/trainer_state.json" for _, path in reversed(folders))]
    for name in names:
        path = file_inside(run.folder, name)
        if path is None:
            continue
        try:
            state = json_object(path)
        except DatasetError as error:  # as of a checkpoint that is being written; an older one is as good
            run.notes.append(str(error))
            continue
        history, step, most = (state.get(key) for key in ("log_history", "global_step", "max_steps"))
        _take_rows(run, (row for row in history if isinstance(row, dict)) if isinstance(history, list) else ())
        # Written before the last row is logged, which says so elsewhere.
        run.has_ended |= 0 < (as_step(most) or 0) <= (as_step(step) or 0)
        run.source = name
        return


def _read_demo(run: Run) -> None:
    """The measurements of one run of the demo, and its logs where there are no others."""
    path = file_inside(run.folder, "result.json")
    if path is None:
        return
    try:
        result = json_object(path)
    except DatasetError as error:
        if not run.source:
            raise
        run.notes.append(str(error))  # of something else that has this name
        return
    records, log = result.get("records"), result.get("log")
    if not isinstance(records, list):
        return
    is_whole = [isinstance(record, dict) and as_step(record.get("step")) is not None for record in records]
    run.demo_records = list(compress(records, is_whole))
    if not run.source:
        _take_rows(run, (row for row in log if isinstance(row, dict)) if isinstance(log, list) else ())
        run.source = "result.json"
        run.has_ended = True
    if not run.held_out:
        for record in run.demo_records:
            for name, key in _DEMO_HELD_OUT.items():
                if (number := as_number(record.get(name))) is not None:
                    _add_held_out(run, HELD_OUT, record["step"], key, number)


_DEMO_HELD_OUT = {
    "held_out_accuracies": "rewards/accuracies",
    "held_out_chosen": "rewards/chosen",
    "held_out_rejected": "rewards/rejected",
    "held_out_margins": "rewards/margins",
    "held_out_chosen_error": "drift/chosen_error",
}


def started_at(start: Mapping[str, Any]) -> str:
    """When a start was, in UTC, as text; empty where it is not known."""
    return time_text(_seconds(start.get("time")))


def time_text(seconds: float) -> str:
    """A time since the epoch, in UTC, as text; empty of 0, and of what no calendar has."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if seconds else ""
    except (ValueError, OverflowError, OSError):
        return ""
