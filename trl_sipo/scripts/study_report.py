# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo study report`: who wins, how sure that is, how far raters agree, and who is left out."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sipo.annotation.rater_checks import CheckSettings
from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import ArgumentParser, printable, words_without_secrets

if TYPE_CHECKING:
    from trl_sipo.annotation.study_analysis import StudyAnalysis


def make_parser(prog: str = "trl-sipo study report") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Say who wins, with intervals, how far raters agree, and which are left out and why. The study "
        "may still be running.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="folder of the study")
    add("--output", type=Path, metavar="DIR", help="default: report, in the study's folder")
    add("--level", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    add("--num_resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, help="of bootstrap and tests (default: %(default)s)")
    add_check_options(parser)
    return parser


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """From where on a rater is left out."""
    add, default = parser.add_argument_group("raters are left out").add_argument, CheckSettings()
    for name, metavar, text in (
        ("max_side_share", "SHARE", "from this share of decisions on one side on"),
        ("min_gold_share", "SHARE", "below this share of gold pairs right"),
        ("max_reversed_share", "SHARE", "above this share of mirrored repeats reversed"),
        ("min_median_seconds", "SECONDS", "below this median time for an answer"),
        ("min_answered_share", "SHARE", "below this share of their tasks answered"),
    ):
        add(f"--{name}", type=float, default=getattr(default, name), metavar=metavar, help=f"{text} (%(default)s)")


def check_settings(arguments: argparse.Namespace) -> CheckSettings:
    """The thresholds that were given.

    Raises:
        StudyError: One is out of range.
    """
    return CheckSettings(**{name: getattr(arguments, name) for name in vars(CheckSettings())})


def run(command: str, argv: list[str]) -> None:
    """Analyse, print the verdict, and write the report.

    Raises:
        StudyError: There is no such study, nobody has answered, or a threshold is out of range.
        ConfigurationError: A level or number of resamples out of range.
        StorageError: The report cannot be written.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    checks = check_settings(arguments)
    from trl_sipo.annotation.store import Store
    from trl_sipo.annotation.study_analysis import analyse
    from trl_sipo.annotation.study_report import write_report
    from trl_sipo.evaluation.comparison import StatisticsSettings

    if arguments.seed < 0:
        raise ConfigurationError(f"`--seed` must be zero or more, got {arguments.seed}.")
    statistics = StatisticsSettings(arguments.level, arguments.num_resamples, arguments.seed)
    store = Store.open(arguments.study)
    analysis = analyse(store, checks, statistics)
    output = arguments.output or store.path.parent / "report"
    store.close()
    words = shlex.join(words_without_secrets(["trl-sipo", *command.split(), *argv]))
    paths = write_report(analysis, output, command=words, checks=checks)
    tell(analysis)
    print("Written: " + ", ".join(printable(path) for path in paths))


def tell(analysis: "StudyAnalysis") -> None:
    """Print what the study says, and who is left out."""
    from trl_sipo.annotation.study_report import verdict

    for sentence in verdict(analysis):
        print(printable(sentence))
    for check in analysis.discarded:
        print(printable(f"{check.rater.name} is left out: {'; '.join(check.reasons)}."))
