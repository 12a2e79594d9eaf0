# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo study build`: the samples of two or more models as blind tasks for raters."""

import argparse
import csv
import os
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sipo.annotation.records import GUIDELINES, QUESTION, Study
from trl_sipo.errors import StorageError, StudyError
from trl_sipo.printing import ArgumentParser, printable

if TYPE_CHECKING:
    from trl_sipo.annotation.tasks import BuildPlan, BuildSettings, Invitation

_MAX_GUIDELINES = 100_000  # characters


def make_parser(prog: str = "trl-sipo study build") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Make a blind study of the samples of two or more models: pairs, raters, an order and sides of "
        "each rater's own. Who the models are is in the study's database alone.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="[NAME=]FOLDER",
        help="samples of a model, or the output of `trl-sipo evaluate`, with all models in it",
    )
    add("--output", type=Path, required=True, metavar="STUDY", help="a folder that is not there")
    add("--prompts", type=Path, metavar="FILE", help="table of file_name, prompt, category, for plain folders")
    add("--against", metavar="NAME", help="compare all models with this one (default: each two)")
    add("--samples_per_prompt", type=int, default=1, metavar="N", help="the first ones (default: %(default)s)")
    add("--max_prompts", type=int, metavar="N", help="take so many prompts, at random")
    add("--seed", type=int, help="of all that is random (default: drawn, and kept in the study)")
    add("--dry_run", action="store_true", help="say what would be made, and stop")
    raters = parser.add_argument_group("raters").add_argument
    raters("--groups", type=int, default=3, metavar="N", help="default: %(default)s")
    raters("--raters_per_group", type=int, default=4, metavar="N", help="default: %(default)s")
    raters("--tasks_per_rater", type=int, metavar="N", help="pairs for each (default: all)")
    raters("--invitations", type=Path, metavar="FILE", help="write the tokens there (CSV), instead of printing them")
    checks = parser.add_argument_group("checks of the raters").add_argument
    checks("--gold", default="auto", metavar="auto|none|FOLDER", help="pairs of which the better is known")
    checks("--num_gold", type=int, metavar="N", help="of auto (default: a twentieth of the pairs)")
    checks("--num_mirrored", type=int, metavar="N", help="pairs that come twice (default: a tenth of a rater's)")
    texts = parser.add_argument_group("texts").add_argument
    texts("--title", default="Which is better?", help="default: %(default)s")
    texts("--question", default=QUESTION, help="default: %(default)s")
    texts("--guidelines", type=Path, metavar="FILE", help="text for the raters (default: that of the SIPO paper)")
    texts("--no_tie", action="store_true", help="ask for a decision in every case")
    return parser


def build_settings(arguments: argparse.Namespace) -> "BuildSettings":
    """What the options say.

    Raises:
        StudyError: A number out of range, or guidelines that cannot be read.
    """
    from trl_sipo.annotation.tasks import BuildSettings

    study = Study(
        title=arguments.title,
        guidelines=GUIDELINES if arguments.guidelines is None else _read_text(arguments.guidelines),
        question=arguments.question,
        allows_tie=not arguments.no_tie,
        seed=secrets.randbits(62) if arguments.seed is None else arguments.seed,
        tasks_per_rater=arguments.tasks_per_rater,
    )
    return BuildSettings(
        study=study,
        groups=arguments.groups,
        raters_per_group=arguments.raters_per_group,
        against=arguments.against,
        samples_per_prompt=arguments.samples_per_prompt,
        max_prompts=arguments.max_prompts,
        gold=None if arguments.gold == "none" else arguments.gold,
        num_gold=arguments.num_gold,
        num_mirrored=arguments.num_mirrored,
    )


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MAX_GUIDELINES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"The guidelines {str(path)!r} cannot be read: {error}.") from error
    if not text.strip() or len(text) > _MAX_GUIDELINES:
        raise StudyError(f"The guidelines {str(path)!r} need 1 to {_MAX_GUIDELINES:,} characters.")
    return text.strip()


def run(command: str, argv: list[str]) -> None:
    """Say what is made, make it, and print the tokens.

    Raises:
        StudyError: Samples that do not pair, numbers that do not fit, or a place that is taken.
        DatasetError: A file that cannot be read.
        StorageError: The study cannot be written.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    from trl_sipo.annotation.sources import model_folders
    from trl_sipo.annotation.tasks import build_study, check_output, plan_study

    check_output(arguments.output)
    if arguments.invitations is not None:
        _check_new_file(arguments.invitations)
    plan = plan_study(model_folders(arguments.models), build_settings(arguments), arguments.prompts)
    print(printable(summary(plan)))
    if arguments.dry_run:
        return
    invitations = build_study(plan, arguments.output)
    print(f"\nWritten to {printable(arguments.output)}. The tokens are kept nowhere else:")
    tell_tokens(invitations, arguments.invitations)
    print(f"Next:\n  trl-sipo study serve {shlex.quote(str(arguments.output))}")


def _check_new_file(file: Path) -> None:
    if file.exists() or file.is_symlink():
        raise StudyError(f"{str(file)!r} is there already, and is not overwritten. Give another --invitations.")
    if not file.absolute().parent.is_dir():
        raise StudyError(f"There is no folder {str(file.parent)!r} for the invitations. Make it, or give another.")


def summary(plan: "BuildPlan") -> str:
    """A few lines on a study that is not yet written."""
    settings, study = plan.settings, plan.settings.study
    gold = sum(pair.is_gold for pair in plan.pairs)
    couples = dict.fromkeys(pair.models for pair in plan.pairs if not pair.is_gold)
    num_raters = plan.num_raters
    lines = [
        f"{len(plan.pairs) - gold} pairs of {len({p.samples[0].prompt_id for p in plan.pairs if not p.is_gold})} "
        f"prompts, and {gold} of which the better is known: "
        + "; ".join(f"{first} and {second}" for first, second in couples)
        + ".",
        f"{num_raters} raters in {settings.groups} groups. Each gets {plan.tasks_per_rater} tasks, of which {gold} "
        f"gold and {study.num_mirrored} mirrored: about {plan.minutes_per_rater:.0f} minutes; "
        f"{num_raters * plan.tasks_per_rater} answers in all.",
    ]
    if study.tasks_per_rater is not None:
        answers = study.tasks_per_rater * settings.raters_per_group / (len(plan.pairs) - gold)
        lines.append(f"In each group a pair gets {answers:.3g} answers in the mean.")
    return "\n".join([*lines, *plan.notes])


def tell_tokens(invitations: Sequence["Invitation"], file: Path | None) -> None:
    """Print tokens, or write them to a file that only its owner can read.

    Raises:
        StorageError: The file cannot be written; the tokens are printed then, since they are nowhere else.
    """
    if file is not None:
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as opened:
                writer = csv.writer(opened)
                writer.writerow(["rater", "group", "token"])
                writer.writerows((i.name, i.group, i.token) for i in invitations)
        except OSError as error:
            tell_tokens(invitations, None)
            raise StorageError(f"{str(file)!r} cannot be written: {error}. The tokens are printed above.") from error
        print(f"  in {printable(file)}")
        return
    for invitation in invitations:
        print(f"{printable(invitation.name)}  group {invitation.group}  {invitation.token}")
