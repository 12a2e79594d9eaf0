# SPDX-License-Identifier: Apache-2.0
"""Rapidata's preference datasets: two images and the votes that each received."""

from trl_sipo.errors import DatasetError


def vote_share(first: float | None, second: float | None) -> float | None:
    """The share of votes for the first image: a soft label. None (not judged) without votes.

    Raises:
        DatasetError: a number of votes that is negative.
    """
    first, second = first or 0, second or 0
    if first < 0 or second < 0:
        raise DatasetError(f"the numbers of votes {first} and {second} must not be negative")
    return first / (first + second) if first + second else None
