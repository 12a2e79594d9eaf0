# SPDX-License-Identifier: Apache-2.0
"""What the command lines of studies have in common: processes, where runs and results go, how a command ends."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_sipo.errors import ConfigurationError, StorageError

#: Of the repository.
ROOT = Path(__file__).resolve().parents[2]


def add_places(parser: argparse.ArgumentParser, reports: Path, runs: str) -> None:
    """Add the options `--workers`, `--quick`, `--runs` and `--output`.

    Args:
        parser: What they are added to.
        reports: Folder of the study's report.
        runs: Name of the folder of its runs, which git ignores.
    """
    add = parser.add_argument
    add("--workers", type=int, default=2, help="training processes at a time, of one thread each")
    add("--quick", action="store_true", help="a few steps, to see that it runs; numbers mean nothing")
    add("--runs", type=Path, default=ROOT / "runs" / runs, help="where runs are kept")
    add("--output", type=Path, help=f"where results go; default: reports/{reports.name}, quick: --runs")


def check_places(options: argparse.Namespace, reports: Path) -> None:
    """Check these options and fill in their defaults; quick runs have a folder of their own.

    Raises:
        ConfigurationError: Options that nothing can be made with.
    """
    if options.workers < 1:
        raise ConfigurationError(f"--workers {options.workers}: at least one process is needed.")
    for name in ("runs", "output"):
        folder = getattr(options, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ConfigurationError(f"--{name} {folder} is a file: name a folder.")
    if options.quick:
        options.runs = options.runs / "quick"
    options.output = options.output or (options.runs if options.quick else reports)
    if options.quick and options.output.resolve().is_relative_to(ROOT / "reports"):
        raise ConfigurationError(f"--output {options.output}: quick runs mean nothing and do not belong into reports.")


def guarded(command: Callable[..., Any], *arguments: Any) -> None:
    """Run a command; what a user can act on ends it with a line and not with a traceback."""
    try:
        command(*arguments)
    except (ConfigurationError, StorageError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. Finished runs are kept: the same command goes on.")
