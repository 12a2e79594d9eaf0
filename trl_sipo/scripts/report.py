# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo report`: what one or several runs did, as one HTML file, also while they go on."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sipo.errors import ConfigurationError, DatasetError, StorageError
from trl_sipo.printing import ArgumentParser, printable

if TYPE_CHECKING:
    from trl_sipo.reporting.run_files import Run
    from trl_sipo.reporting.run_pictures import PictureReader
    from trl_sipo.reporting.run_quality import Quality

WATCH_SECONDS = 30.0
_IDLE_SECONDS = 3600.0
_IDLE = (
    "Nothing has been logged for an hour. A run that was killed never says that it has ended: start it again, or "
    "press Ctrl-C."
)
_MOST_RUNS = 24
_LARGEST_SIDE = 2048


def make_parser(prog: str = "trl-sipo report") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Write one HTML file about one or several training runs: rewards, quality, drift, noise levels, "
        "sample grids, settings. It opens from disk, and needs no network.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training run")
    add("--output", type=Path, required=True, metavar="FILE", help="the HTML file")
    add("--title", help="of the page (default: the runs' names)")
    add(
        "--evaluation",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="outputs of `trl-sipo evaluate` whose models are checkpoints of these runs: quality over steps",
    )
    add("--max_pictures", type=int, default=160, metavar="N", help="of samples; a clip counts as 8 (default: 160)")
    add("--picture_size", type=int, default=384, metavar="PX", help="longest side of one (default: %(default)s)")
    add(
        "--watch",
        nargs="?",
        type=float,
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"write again as the runs go on, until they end or Ctrl-C (every {WATCH_SECONDS:g} s if not given)",
    )
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] on options that make no sense, before anything is read."""
    from trl_sipo.reporting.run_quality import check_evaluations

    if arguments.max_pictures < 0:
        raise ConfigurationError(f"`--max_pictures` must be at least 0, got {arguments.max_pictures}.")
    if not 16 <= arguments.picture_size <= _LARGEST_SIDE:
        raise ConfigurationError(f"`--picture_size` must be from 16 to {_LARGEST_SIDE}, got {arguments.picture_size}.")
    if arguments.watch is not None and not 1 <= arguments.watch <= 86400:
        raise ConfigurationError(f"`--watch` takes seconds, from 1 to 86400, got {arguments.watch:g}.")
    if len(arguments.runs) > _MOST_RUNS:
        raise ConfigurationError(f"A page shows at most {_MOST_RUNS} runs, got {len(arguments.runs)}.")
    check_evaluations(arguments.evaluation)
    try:
        _check_output(arguments.output)
    except OSError as error:  # of a name that is too long, say
        raise ConfigurationError(f"`--output` cannot be used: {error.strerror}. Choose another name.") from error


def _check_output(output: Path) -> None:
    folder = output.parent
    if output.is_dir():
        raise ConfigurationError(
            f"`--output {output}` is a folder. Name a file in it, such as {output / 'report.html'}."
        )
    if output.suffix.lower() not in (".html", ".htm"):  # else a slip would replace a run's own file
        raise ConfigurationError(f"`--output {output}`: the page is an HTML file. Name it so, such as {output}.html.")
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigurationError(
            f"`--output {output}`: nothing can be written in {str(existing)!r}. Choose another place."
        )


def run(command: str, argv: list[str]) -> None:
    """Read the runs and write the page; with `--watch`, again and again.

    Raises:
        ConfigurationError: Options that make no sense, a folder that is no run.
        DatasetError: A file of a run that is none.
        StorageError: The page cannot be written.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    check_arguments(arguments)
    from trl_sipo.reporting.run_pictures import Limits, PictureReader

    # A base and a step each, or none at all.
    pictures = max(2, arguments.max_pictures // len(arguments.runs)) if arguments.max_pictures else 0
    limits = Limits(pictures, arguments.picture_size)
    reader = PictureReader(limits)
    if arguments.watch is None:
        runs, quality = write_page(arguments, reader, reload_seconds=None)
        print(f"Open {arguments.output}.")
        for one in runs:
            print(f"- {printable(one.name)}: {printable(headline(one, quality))}")
    else:
        watch(arguments, reader)


def write_page(
    arguments: argparse.Namespace,
    reader: "PictureReader",
    *,
    reload_seconds: int | None,
    may_be_new: bool = False,
) -> "tuple[Sequence[Run], Quality]":
    """Read everything and write the page, whole or not at all; returns the runs and their quality.

    Args:
        reload_seconds: Between two looks of a page whose runs go on.
        may_be_new: Whether a run may not have begun.
    """
    from trl_sipo.data.cache.shards import write_whole
    from trl_sipo.reporting.run_files import read_runs
    from trl_sipo.reporting.run_pictures import read_samples
    from trl_sipo.reporting.run_quality import read_quality
    from trl_sipo.reporting.run_report import Contents, run_page

    runs = read_runs(arguments.runs, may_be_new=may_be_new)
    samples = [read_samples(run.folder, reader) if reader.limits.pictures else None for run in runs]
    is_over = all(run.has_ended for run in runs)
    title = arguments.title or " and ".join(run.name for run in runs)
    quality = read_quality(runs, arguments.evaluation)
    page = run_page(Contents(title, runs, samples, quality, None if is_over else reload_seconds))
    write_whole(arguments.output, lambda path: path.write_text(page, encoding="utf-8", errors="replace"))
    return runs, quality


def headline(run: "Run", quality: "Quality") -> str:
    """The verdict on a run, in a line."""
    from trl_sipo.reporting.run_findings import findings_of

    findings = findings_of(run, quality)
    return f"{findings.verdict}. {findings.sentences[0]}"


def watch(arguments: argparse.Namespace, reader: "PictureReader") -> None:
    """Write the page whenever the runs' files have changed, until all runs have ended, or Ctrl-C."""
    print(f"Watching; open {arguments.output}. Ctrl-C ends it, and the page stays.", flush=True)
    try:
        _write_changes(arguments, reader)
        print("All runs have ended.")
    except KeyboardInterrupt:
        write_page(arguments, reader, reload_seconds=None, may_be_new=True)  # one that no longer looks again
        print(f"\nStopped watching. Open {arguments.output}.")


def _write_changes(arguments: argparse.Namespace, reader: "PictureReader") -> None:
    seen: object = None
    changed, told = time.monotonic(), ""
    while True:
        state = state_of([*arguments.runs, *arguments.evaluation])
        if state != seen:
            try:
                if _write_change(arguments, reader):
                    return
                seen, changed, told = state, time.monotonic(), ""
            except (DatasetError, StorageError, OSError) as error:  # of a file being replaced, or a disk that is full
                told = _tell(f"The page was not written, which is tried again. {error}", told)
        elif time.monotonic() - changed > _IDLE_SECONDS:
            told = _tell(_IDLE, told)
        time.sleep(arguments.watch)


def _write_change(arguments: argparse.Namespace, reader: "PictureReader") -> bool:
    """Write the page once more; returns whether all runs have ended."""
    runs, quality = write_page(arguments, reader, reload_seconds=max(1, round(arguments.watch)), may_be_new=True)
    reader.forget_unused()
    for one in runs:
        waits = "has not begun yet" if one.is_empty else f"step {one.last_step}: {headline(one, quality)}"
        print(f"- {printable(one.name)}: {printable(waits)}", flush=True)
    return all(one.has_ended for one in runs)


def _tell(text: str, told: str) -> str:
    """Print a text unless it was told already; returns it."""
    if text != told:
        print(printable(text), file=sys.stderr, flush=True)
    return text


def state_of(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files that a page is made from: it is another if one of these has changed."""
    patterns = ("run_log/*.jsonl", "samples", "samples/*", "checkpoint-*/trainer_state.json", "*.json")
    paths = sorted(path for folder in folders for pattern in patterns for path in folder.glob(pattern))
    found = []
    for path in paths:
        try:
            state = path.stat()
        except FileNotFoundError:  # replaced or removed just now
            continue
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return found
