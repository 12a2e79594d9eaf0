# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo study serve STUDY`: the pages on which raters answer, until it is stopped."""

import argparse
from pathlib import Path

from trl_sipo.annotation.serving import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    Address,
    check_listening,
    log_to_terminal,
    make_server,
    progress_of,
    run_until_stopped,
    url_of,
    warning_of,
)
from trl_sipo.printing import ArgumentParser, printable


def make_parser(prog: str = "trl-sipo study serve") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Serve a study to its raters, who sign in with their invitations. It can be stopped and started "
        "at any time: answers that a page called saved are, and raters go on where they were.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="folder that `trl-sipo study build` made")
    add_server_options(parser)
    return parser


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Where to listen, and what to print."""
    add = parser.add_argument_group("server").add_argument
    add("--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s, this machine alone)")
    add("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one (default: %(default)s)")
    add(
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name of the server, as of a proxy before it",
    )
    add("--log_requests", action="store_true", help="print a line for each request; no token, cookie or answer in it")


def address_of(arguments: argparse.Namespace) -> Address:
    """Where the options say to listen; raises [`ConfigurationError`] where one cannot."""
    address = Address(arguments.host, arguments.port, tuple(arguments.allowed_host))
    check_listening(address)
    return address


def run(command: str, argv: list[str]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigurationError: Options that make no sense, or a port that is taken.
        StudyError, StorageError: No study, or one that cannot be written.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    address = address_of(arguments)
    from trl_sipo.annotation.store import Store

    store = Store.open(arguments.study)
    server = make_server(store, address)
    log_to_terminal(requests=arguments.log_requests)
    url = url_of(address.host, server.port)
    print(printable(f"{store.study().title}: answers so far"))
    for rater, done, total in progress_of(store):
        print(printable(f"  {rater.name}, group {rater.group}: {done} of {total}"))
    print(f"Listening on {url}\nA rater's link is {url}#token=TOKEN, with the token of their invitation.")
    if warning := warning_of(address.host):
        print(warning)
    print("Ctrl-C stops it; the same command continues.", flush=True)
    is_finished = run_until_stopped(server)
    progress = progress_of(store)
    stored = f"{sum(done for _, done, _ in progress)} of {sum(total for *_, total in progress)} answers are stored"
    print(f"Stopped: {stored}." + ("" if is_finished else " A request was cut off."))
