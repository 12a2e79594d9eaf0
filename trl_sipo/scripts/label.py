# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo label A B`: choose between the files of two folders in the browser, and get preference pairs."""

import argparse
import shlex
from pathlib import Path

from trl_sipo.annotation.records import LABEL_TITLE, QUESTION
from trl_sipo.annotation.serving import (
    log_to_terminal,
    make_server,
    progress_of,
    run_until_stopped,
    url_of,
    warning_of,
)
from trl_sipo.annotation.store import Store
from trl_sipo.printing import ArgumentParser, printable
from trl_sipo.scripts.study_serve import add_server_options, address_of


def make_parser(prog: str = "trl-sipo label") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Choose between the images or videos of two folders, by equal file names, on the page of "
        "`trl-sipo study`, without blinding. At the end the choices are preference pairs to train on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("first", metavar="[NAME=]FOLDER_A", help="samples; the name is shown (default: the folder's)")
    add("second", metavar="[NAME=]FOLDER_B", help="samples with the same file names")
    add("--output", type=Path, required=True, metavar="DIR", help="of answers and pairs; the same one goes on")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="table of file_name, prompt, category (default: metadata.csv or metadata.jsonl in one of the folders)",
    )
    add("--title", help=f"default: {LABEL_TITLE}")
    add("--question", help=f"default: {QUESTION}")
    add("--no_tie", action="store_true", help="ask for a decision in every case")
    add_server_options(parser)
    return parser


def run(command: str, argv: list[str]) -> None:
    """Serve the page until Ctrl-C or SIGTERM, and write the pairs.

    Raises:
        ConfigurationError: Options that make no sense, or a port that is taken.
        StudyError: Folders that do not pair, or a place that is taken by something else.
        DatasetError: A file that cannot be read.
        StorageError: Something cannot be written.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    address = address_of(arguments)
    from trl_sipo.annotation.labelling import open_session
    from trl_sipo.annotation.sources import model_folders

    session = open_session(
        model_folders([arguments.first, arguments.second]),
        arguments.output,
        title=arguments.title,
        question=arguments.question,
        prompts=arguments.prompts,
        allows_tie=not arguments.no_tie,
    )
    server = make_server(session.store, address)
    log_to_terminal(requests=arguments.log_requests)
    ((_, done, total),) = progress_of(session.store)
    going_on = f"Going on with the copies in {arguments.output}: {done} of {total} pairs are answered"
    print(f"{total} pairs" if session.is_new else printable(going_on))
    print(f"Open {url_of(address.host, server.port)}#token={session.token}")
    if warning := warning_of(address.host):
        print(warning)
    print("Ctrl-C ends it, and writes the pairs; the same command continues.", flush=True)
    run_until_stopped(server)
    tell(session.store)


def tell(store: Store) -> None:
    """Write the pairs of what was answered so far, and say what became of them."""
    from trl_sipo.annotation.labelling import write_pairs

    written = write_pairs(store)
    if written is None:
        print("Stopped. No pair is decided yet, so that there is nothing to train on.")
        return
    path, counts = written
    quoted = shlex.quote(str(path))
    print(f"Stopped. {counts.pairs} pairs, {counts.ties} ties left out, {counts.unjudged} without an answer.")
    print(printable(f"Next:\n  trl-sipo data check {quoted}\n  trl-sipo sipo --dataset_name {quoted} ..."))
