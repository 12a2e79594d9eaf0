# SPDX-License-Identifier: Apache-2.0
"""Labelling one's own pairs: a study of two folders with one rater, who sees which is which."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trl_sipo.annotation.records import LABEL_TITLE, QUESTION, Study
from trl_sipo.annotation.store import STUDY_FILE, Store
from trl_sipo.annotation.study_pairs import PAIRS_FILE, ImportCounts, num_samples, write_preference_pairs
from trl_sipo.annotation.tasks import BuildPlan, BuildSettings, build_study, plan_study
from trl_sipo.annotation.votes import last_judgements, votes
from trl_sipo.errors import StorageError, StudyError

GUIDELINES: Final = """\
Choose the better of the two for the text above them; "tie" leaves the pair out of the data.
Your answers become preference pairs when the server is stopped. Started again, it goes on where you were."""


@dataclass(frozen=True)
class LabelSession:
    """What a label session works on.

    Attributes:
        store: Of the pairs and the answers.
        token: By which the one rater signs in; those of earlier sessions are void.
        is_new: Nothing was answered before.
    """

    store: Store
    token: str
    is_new: bool


def open_session(
    folders: Mapping[str, Path],
    output: Path,
    *,
    title: str | None = None,
    question: str | None = None,
    prompts: Path | None = None,
    allows_tie: bool = True,
) -> LabelSession:
    """Make a study of two folders, or go on with the one that is there.

    Args:
        folders: By name; the names are shown.
        output: The study's folder.
        title, question: What the page says; None: what the session says that is there, or "Label", and which of the
            two is better.
        prompts: A table of prompts, for folders that do not tell them.
        allows_tie: Of a new session. One that is there cannot come to do without.

    Raises:
        StudyError: Folders that do not pair; or a study at this place that is of others, of other files, or says
            something else.
        DatasetError: A file that cannot be read.
        StorageError: It cannot be written.
    """
    if len(folders) != 2:
        raise StudyError(f"Two folders are compared, and these are {len(folders)}: {', '.join(folders)}.")
    if output.exists() or output.is_symlink():
        if not (output / STUDY_FILE).is_file():
            raise StudyError(f"{str(output)!r} is there already, and holds no label session. Give another --output.")
        store = Store.open(output)
        _check_models(store, folders, output)
        _check_texts(store.study(), title, question, allows_tie, output)
        _check_files(store, _plan(store.study(), folders, prompts), output)
        (rater,) = store.raters()
        return LabelSession(store, store.renew_token(rater.name), is_new=False)
    texts = {"title": LABEL_TITLE if title is None else title, "question": QUESTION if question is None else question}
    study = Study(**texts, guidelines=GUIDELINES, is_blind=False, allows_tie=allows_tie)
    (invitation,) = build_study(_plan(study, folders, prompts), output)
    return LabelSession(Store.open(output), invitation.token, is_new=True)


def _plan(study: Study, folders: Mapping[str, Path], prompts: Path | None) -> BuildPlan:
    settings = BuildSettings(study, groups=1, raters_per_group=1, gold=None, num_mirrored=0)
    return plan_study(folders, settings, prompts)


def _check_texts(study: Study, title: str | None, question: str | None, allows_tie: bool, output: Path) -> None:
    asked = {"--title": (title, study.title), "--question": (question, study.question)}
    changed = [option for option, (given, stored) in asked.items() if given not in (None, stored)]
    if study.allows_tie and not allows_tie:
        changed.append("--no_tie")
    if changed:
        raise StudyError(
            f"{str(output)!r} was begun with another {', '.join(changed)}, which stays. Leave it out, or give another "
            "--output."
        )


def _check_files(store: Store, plan: BuildPlan, output: Path) -> None:
    stored, given = (
        {(pair.prompt_id, pair.prompt, pair.category) for pair in pairs}
        for pairs in (store.pairs(), plan.comparisons())
    )
    if stored != given:
        examples = ", ".join(repr(name) for name, *_ in sorted(stored ^ given)[:3])
        raise StudyError(
            f"{str(output)!r} is a label session of {len(stored)} pairs, and the folders hold {len(given)}; names or "
            f"prompts differ, as of {examples}. Give another --output, or the folders and prompts as they were."
        )


def _check_models(store: Store, folders: Mapping[str, Path], output: Path) -> None:
    models = {name for pair in store.pairs() for name in pair.models}
    if store.study().is_blind or len(store.raters()) != 1:
        raise StudyError(f"{str(output)!r} is a study of several raters, and no label session. Give another --output.")
    if models != set(folders):
        raise StudyError(
            f"{str(output)!r} is a label session of {' and '.join(sorted(models))}, not of "
            f"{' and '.join(sorted(folders))}. Give another --output, or names: NAME=FOLDER."
        )


def write_pairs(store: Store) -> tuple[Path, ImportCounts] | None:
    """Write the session's pairs beside its answers, in the place of those of earlier sessions.

    Returns:
        The file and what became of the pairs; None: nothing was decided but ties.

    Raises:
        StorageError: It cannot be written.
    """
    pairs = store.pairs()
    found = votes(pairs, last_judgements(store.answers()))
    folder = store.path.parent
    path = folder / PAIRS_FILE
    try:
        if all(vote.share_of_second == 0.5 for vote in found):
            path.unlink(missing_ok=True)  # of an earlier session, whose answers have changed
            return None
        with tempfile.TemporaryDirectory(prefix=".pairs.", dir=folder) as scratch:
            counts = write_preference_pairs(found, store.media_folder, Path(scratch), num_pairs=num_samples(pairs))
            os.replace(Path(scratch) / PAIRS_FILE, path)
    except OSError as error:
        raise StorageError(
            f"{str(path)!r} cannot be written: {error}. The answers are kept: `trl-sipo study import` writes it too."
        ) from error
    return path, counts
