# SPDX-License-Identifier: Apache-2.0
"""Rapidata's preference datasets: two images or videos, and the votes that each received by one or more criteria.

The older ones count votes of one question; the newer ones hold a weighted share of them for each of three.
"""

from trl_sipo.errors import DatasetError

_IMAGES, _VIDEOS = ("image1", "image2"), ("video1", "video2")
_CRITERIA = ("preference", "alignment", "coherence")

# Name of a layout: its arms, and the columns with their votes.
VOTES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "rapidata": (_IMAGES, ("votes_image1", "votes_image2")),
    **{
        f"rapidata_{name}": (_IMAGES, (f"weighted_results_image1_{name}", f"weighted_results_image2_{name}"))
        for name in _CRITERIA
    },
    **{
        f"rapidata_video_{name}": (_VIDEOS, (f"weighted_results1_{word}", f"weighted_results2_{word}"))
        for name, word in zip(_CRITERIA, map(str.capitalize, _CRITERIA), strict=True)
    },
}


def vote_share(first: float | None, second: float | None) -> float | None:
    """The share of votes for the first image: a soft label. None (not judged) without votes.

    Raises:
        DatasetError: votes that are no numbers, or negative.
    """
    first, second = first or 0, second or 0
    if any(not isinstance(votes, int | float) or votes < 0 for votes in (first, second)):
        raise DatasetError(f"the votes {first!r} and {second!r} must be numbers that are not negative")
    return first / (first + second) if first + second else None
