# SPDX-License-Identifier: Apache-2.0
"""The result of a study as preference pairs in the canonical schema, to train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import datasets

from trl_sipo.annotation.media import without_filling
from trl_sipo.annotation.records import TIE, Comparison
from trl_sipo.annotation.votes import FIRST, SECOND, PairVote
from trl_sipo.errors import StudyError
from trl_sipo.feedback.feedback import pair_features, write_rows
from trl_sipo.generation.names import links_out_of

PAIRS_FILE: Final = "pairs.parquet"


@dataclass(frozen=True)
class ImportCounts:
    """What became of the pairs of a study.

    Attributes:
        pairs: Written.
        ties: Final ties, dropped.
        contested: Dropped, since the groups' majorities chose one, and of all answers no more were for it.
        below_margin: Dropped, since they are below the margin that was asked for.
        unjudged: Nobody answered.
    """

    pairs: int
    ties: int
    contested: int
    below_margin: int
    unjudged: int


def write_preference_pairs(
    votes: Sequence[PairVote],
    media_folder: Path,
    output: Path,
    *,
    num_pairs: int,
    min_margin: float = 0.0,
) -> ImportCounts:
    """Write `pairs.parquet`, files of the samples included, so that it stands alone.

    Columns: `prompt`, `chosen`, `rejected`; `label`, the share of the answers for the chosen one, in (0.5, 1], a tie
    one half; `margin`, the share for the chosen one less that for the rejected one; `category`; `source`, the two
    models; `pair_id`.

    Args:
        votes: By pair.
        media_folder: Of the study.
        output: The folder that it is written to.
        num_pairs: Of the study, without gold ones.
        min_margin: In [0, 1]; pairs below are dropped.

    Raises:
        StudyError: There is such a file already, the margin is out of range, a file of the study is missing or a link
            to elsewhere, or no pair is left.
        StorageError: It cannot be written.
    """
    if not 0 <= min_margin <= 1:
        raise StudyError(f"`min_margin` must be from 0 to 1, got {min_margin}.")
    path = output / PAIRS_FILE
    if path.exists():
        raise StudyError(f"{str(path)!r} is there already, and is not overwritten. Give another --output.")
    decided = [vote for vote in votes if vote.label != TIE]
    agreed = [vote for vote in decided if _share_of_chosen(vote) > 0.5]
    kept = [vote for vote in agreed if _margin(vote) >= min_margin]
    counts = ImportCounts(
        pairs=len(kept),
        ties=len(votes) - len(decided),
        contested=len(decided) - len(agreed),
        below_margin=len(agreed) - len(kept),
        unjudged=num_pairs - len(votes),
    )
    if not kept:
        raise StudyError(f"No pair of the study is left to train on: {counts}.")
    is_video = {vote.pair.is_video for vote in kept}
    if len(is_video) > 1:
        raise StudyError("The study holds images and videos, which are no one dataset. Build a study of each.")
    _check_files([media_folder / name for vote in kept for name in (vote.pair.first_media, vote.pair.second_media)])
    medium = datasets.Video() if is_video.pop() else datasets.Image()
    features = datasets.Features({**pair_features(medium), "label": datasets.Value("float64")})
    write_rows(path, features, kept, lambda vote: _row(vote, media_folder))
    return counts


def _check_files(paths: Sequence[Path]) -> None:
    """A study may come from others: nothing outside its folder gets into the pairs."""
    for path in paths:
        if not path.is_file():
            raise StudyError(f"The study's file {str(path)!r} is missing. Put it back.")
        if links_out_of(path.parent, [path]):
            raise StudyError(f"{str(path)!r} leads out of the study: it is a link. Put the file there.")


def _margin(vote: PairVote) -> float:
    """One division: of three answers against two it is 0.2, where 2 * 0.6 - 1 in floating point is less."""
    lead = vote.counts[SECOND] - vote.counts[FIRST]
    return (lead if vote.label == SECOND else -lead) / vote.num_answers


def _share_of_chosen(vote: PairVote) -> float:
    return vote.share_of_second if vote.label == SECOND else 1 - vote.share_of_second


def _row(vote: PairVote, media_folder: Path) -> dict[str, Any]:
    pair, share = vote.pair, _share_of_chosen(vote)
    arms = [(pair.first_model, pair.first_media), (pair.second_model, pair.second_media)]
    chosen, rejected = arms[::-1] if vote.label == SECOND else arms
    return {
        "prompt": pair.prompt,
        "chosen": _stored(media_folder, chosen[1]),
        "rejected": _stored(media_folder, rejected[1]),
        "margin": _margin(vote),
        "category": pair.category or None,
        "source": f"{chosen[0]} over {rejected[0]}",
        "pair_id": pair.pair_id,
        "label": share,
    }


def _stored(media_folder: Path, name: str) -> dict[str, Any]:
    return {"bytes": without_filling((media_folder / name).read_bytes()), "path": name}


def num_samples(pairs: Sequence[Comparison]) -> int:
    """Pairs of a study, without gold ones."""
    return sum(not pair.is_gold for pair in pairs)
