# SPDX-License-Identifier: Apache-2.0
"""Labelling one's own pairs: a study of two folders with one rater, who sees which is which."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trl_sipo.annotation.records import Study
from trl_sipo.annotation.store import Store
from trl_sipo.annotation.study_pairs import PAIRS_FILE, ImportCounts, num_samples, write_preference_pairs
from trl_sipo.annotation.tasks import BuildSettings, build_study, plan_study
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
    folders: Mapping[str, Path], output: Path, *, title: str, question: str, prompts: Path | None, allows_tie: bool
) -> LabelSession:
    """Make a study of two folders, or go on with the one that is there.

    Args:
        folders: By name; the names are shown.
        output: The study's folder.
        prompts: A table of prompts, for folders that do not tell them.

    Raises:
        StudyError: Folders that do not pair, or a study at this place that is of others.
        DatasetError: A file that cannot be read.
        StorageError: It cannot be written.
    """
    if len(folders) != 2:
        raise StudyError(f"Two folders are compared, and these are {len(folders)}: {', '.join(folders)}.")
    if output.exists() or output.is_symlink():
        store = Store.open(output)
        _check_same(store, folders, output)
        (rater,) = store.raters()
        return LabelSession(store, store.renew_token(rater.name), is_new=False)
    study = Study(title=title, guidelines=GUIDELINES, question=question, is_blind=False, allows_tie=allows_tie)
    settings = BuildSettings(study, groups=1, raters_per_group=1, gold=None, num_mirrored=0)
    (invitation,) = build_study(plan_study(folders, settings, prompts), output)
    return LabelSession(Store.open(output), invitation.token, is_new=True)


def _check_same(store: Store, folders: Mapping[str, Path], output: Path) -> None:
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
    if all(vote.share_of_second == 0.5 for vote in found):
        return None
    folder = store.path.parent
    path = folder / PAIRS_FILE
    try:
        with tempfile.TemporaryDirectory(prefix=".pairs.", dir=folder) as scratch:
            counts = write_preference_pairs(found, store.media_folder, Path(scratch), num_pairs=num_samples(pairs))
            os.replace(Path(scratch) / PAIRS_FILE, path)
    except OSError as error:
        raise StorageError(
            f"{str(path)!r} cannot be written: {error}. The answers are kept: `trl-sipo study import` writes it too."
        ) from error
    return path, counts
