# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo study export`: all answers, for an analysis of one's own."""

import argparse
from pathlib import Path

from trl_sipo.errors import StudyError
from trl_sipo.printing import ArgumentParser, printable


def make_parser(prog: str = "trl-sipo study export") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Write all answers, the replaced ones among them, with rater, prompt and models.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="folder of the study")
    add("--output", type=Path, required=True, metavar="FILE", help="a new file, .csv or .jsonl")
    return parser


def run(command: str, argv: list[str]) -> None:
    """Write the answers.

    Raises:
        StudyError: There is no such study, or the file is there or of another kind.
        StorageError: It cannot be written.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    from trl_sipo.annotation.store import Store
    from trl_sipo.annotation.study_export import WRITERS, answer_rows
    from trl_sipo.data.cache.shards import write_whole

    file = arguments.output
    if file.suffix not in WRITERS:
        raise StudyError(f"Answers are not written to {str(file)!r}: its name must end with {' or '.join(WRITERS)}.")
    if file.exists():
        raise StudyError(f"{str(file)!r} is there already, and is not overwritten. Give another --output.")
    store = Store.open(arguments.study)
    rows = answer_rows(store)
    store.close()
    text = WRITERS[file.suffix](rows)
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8", newline=""))
    print(f"{len(rows)} answers written to {printable(file)}.")
