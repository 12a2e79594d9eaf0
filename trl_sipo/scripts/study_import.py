# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo study import`: the result of a study as preference pairs, to train the next model on."""

import argparse
import shlex
from pathlib import Path

from trl_sipo.printing import ArgumentParser, printable
from trl_sipo.scripts.study_report import add_check_options, check_settings


def make_parser(prog: str = "trl-sipo study import") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Write the pairs that a study decided as a dataset for the trainers, with the shares of the "
        "answers as soft labels. Ties are dropped and counted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="folder of the study")
    add("--output", type=Path, required=True, metavar="DIR", help="pairs.parquet is written there")
    add("--min_margin", type=float, default=0.0, metavar="SHARE", help="drop pairs below (default: %(default)s)")
    add_check_options(parser)
    return parser


def run(command: str, argv: list[str]) -> None:
    """Write the pairs, and say what became of the others.

    Raises:
        StudyError: There is no such study, nobody has answered, or no pair is left.
        StorageError: They cannot be written.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    checks = check_settings(arguments)
    from trl_sipo.annotation.store import Store
    from trl_sipo.annotation.study_analysis import analyse
    from trl_sipo.annotation.study_pairs import PAIRS_FILE, num_samples, write_preference_pairs

    store = Store.open(arguments.study)
    analysis = analyse(store, checks)
    counts = write_preference_pairs(
        analysis.kept.votes,
        store.media_folder,
        arguments.output,
        num_pairs=num_samples(store.pairs()),
        min_margin=arguments.min_margin,
    )
    store.close()
    print(
        f"{counts.pairs} pairs; dropped: {counts.ties} ties, {counts.contested} on which groups and answers differ, "
        f"{counts.below_margin} below the margin, {counts.unjudged} without an answer. "
        f"{len(analysis.discarded)} of {len(analysis.checks)} raters are left out."
    )
    path = shlex.quote(str(arguments.output / PAIRS_FILE))
    print(printable(f"Next:\n  trl-sipo data check {path}\n  trl-sipo sipo --dataset_name {path} ..."))
