# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo study invite`: one more rater, or a new token for one who lost theirs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trl_sipo.errors import StudyError
from trl_sipo.printing import ArgumentParser, printable


def make_parser(prog: str = "trl-sipo study invite") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog, description="Add a rater to a study, which may be running, or renew a token.", allow_abbrev=False
    )
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="folder of the study")
    add("--name", required=True, help="of the rater, such as rater-13")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--group", type=int, metavar="N", help="to which the rater is added, from 1")
    what("--replaces", metavar="NAME", help="a rater whose tasks are given to this one too; their answers stay")
    what("--renew", action="store_true", help="give a rater of that name a new token; the old one is void")
    return parser


def run(command: str, argv: list[str]) -> None:
    """Print the token, which is kept nowhere else.

    Raises:
        StudyError: There is no such study, rater or group, or the name is used.
        StorageError: The study cannot be written.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    from trl_sipo.annotation.store import Store

    store = Store.open(arguments.study)
    if arguments.renew:
        token = store.renew_token(arguments.name)
    elif arguments.replaces is not None:
        token = store.replace_rater(arguments.replaces, arguments.name)
    else:
        _check_group(arguments.group, sorted({rater.group for rater in store.raters()}))
        token = store.invite(arguments.name, arguments.group)
    group = next(rater.group for rater in store.raters() if rater.name == arguments.name)
    store.close()
    print(f"{printable(arguments.name)}  group {group}  {token}")


def _check_group(group: int, groups: Sequence[int]) -> None:
    """A new group would change of how many groups a majority is needed, which was set when the study was built."""
    if group not in groups:
        raise StudyError(f"The study has no group {group}: its groups are {', '.join(map(str, groups))}.")
