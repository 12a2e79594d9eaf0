# SPDX-License-Identifier: Apache-2.0
"""Judgements of the same pair, and triples of judgements: found by hashes, in 40 bytes of memory per row."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Judgements:
    """Rows whose arms open, as arrays of one length.

    Args:
        row: int64, their numbers, ascending.
        prompt, first, second: int64 hashes.
        label: float64, the share of votes for `first`; NaN: nobody has judged.
    """

    row: np.ndarray
    prompt: np.ndarray
    first: np.ndarray
    second: np.ndarray
    label: np.ndarray

    @property
    def is_identical(self) -> np.ndarray:
        """Rows that show the same thing twice, bool."""
        return self.first == self.second

    @property
    def is_decided(self) -> np.ndarray:
        """Rows that prefer one of two different arms, bool."""
        return ~np.isnan(self.label) & (self.label != 0.5) & ~self.is_identical

    def where(self, chosen: np.ndarray) -> "Judgements":
        """Some of the rows."""
        return Judgements(*(getattr(self, name)[chosen] for name in ("row", "prompt", "first", "second", "label")))

    def sides(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arms in the order of their hashes, and whether the one with the lower hash is preferred."""
        low, high = np.minimum(self.first, self.second), np.maximum(self.first, self.second)
        return low, high, (self.label > 0.5) == (self.first == low)


@dataclass(frozen=True)
class Count:
    """How many of so many."""

    hits: int
    total: int


@dataclass(frozen=True)
class Repeats:
    """Rows that show the same two arms for the same prompt.

    Args:
        rows: int64, those that repeat an earlier one, ascending.
        num_pairs: pairs of arms that occur more than once.
        contradictory_rows: int64, all rows of pairs of which either arm is preferred somewhere, ascending.
        num_contradictory_pairs: such pairs.
        agreement: comparisons of two judgements that agree. The judgements of a pair are compared two by two, each
            once, so that comparisons are independent of one another.
    """

    rows: np.ndarray
    num_pairs: int
    contradictory_rows: np.ndarray
    num_contradictory_pairs: int
    agreement: Count


def find_repeats(judgements: Judgements) -> Repeats:
    """Repeated pairs, ties and rows without a label among them; only decided rows agree or contradict."""
    group = _pair_numbers(judgements)
    order = np.argsort(group, kind="stable")
    later = order[1:][np.diff(group[order]) == 0]

    decided = judgements.where(judgements.is_decided)
    group_of_decided, votes = group[judgements.is_decided], decided.sides()[2]
    for_low = np.bincount(group_of_decided, weights=votes, minlength=1)
    judged = np.bincount(group_of_decided, minlength=1)
    is_contradictory = (for_low > 0) & (for_low < judged)
    return Repeats(
        rows=np.sort(judgements.row[later]),
        num_pairs=int((np.bincount(group, minlength=1) > 1).sum()),
        contradictory_rows=decided.row[is_contradictory[group_of_decided]],
        num_contradictory_pairs=int(is_contradictory.sum()),
        agreement=_agreement(group_of_decided, votes),
    )


def _pair_numbers(judgements: Judgements) -> np.ndarray:
    """A number for each pair of (prompt, arms), the order of the arms apart."""
    low, high, _ = judgements.sides()
    keys = np.stack([judgements.prompt, low, high], axis=1)
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1) if len(keys) else np.zeros(0, dtype=np.int64)


def _agreement(group: np.ndarray, votes: np.ndarray) -> Count:
    order = np.argsort(group, kind="stable")
    group, votes = group[order], votes[order]
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]])) if len(group) else np.zeros(0, int)
    position = np.arange(len(group)) - np.repeat(starts, np.diff(np.append(starts, len(group))))
    second = np.flatnonzero(position % 2 == 1)  # compared with the one before it
    return Count(int((votes[second] == votes[second - 1]).sum()), len(second))


def find_triples(judgements: Judgements) -> Count:
    """Cyclic triples (A over B, B over C, C over A) of those judged in full, within one prompt.

    A pair that is judged several times counts by its majority. No two triples share a judgement, so that they are
    independent of one another; which of several are taken follows from the hashes alone.
    """
    decided = judgements.where(judgements.is_decided)
    low, high, votes = decided.sides()
    cyclic = total = 0
    order = np.argsort(decided.prompt, kind="stable")
    cuts = np.flatnonzero(np.diff(decided.prompt[order])) + 1
    for rows in np.split(order, cuts):
        if len(rows) >= 3:
            hits, count = _triples_of_prompt(low[rows].tolist(), high[rows].tolist(), votes[rows].tolist())
            cyclic, total = cyclic + hits, total + count
    return Count(cyclic, total)


def _triples_of_prompt(low: list[int], high: list[int], votes: list[bool]) -> tuple[int, int]:
    """(cyclic, all) triples that share no pair."""
    balance: dict[tuple[int, int], int] = defaultdict(int)
    for first, second, is_first in zip(low, high, votes, strict=True):
        balance[first, second] += 1 if is_first else -1
    free = {pair for pair, votes_ahead in balance.items() if votes_ahead}
    above: dict[int, set[int]] = defaultdict(set)
    for first, second in free:
        above[first].add(second)
    cyclic = total = 0
    for first, second in sorted(free):
        if (first, second) not in free:
            continue
        for third in sorted(above[first] & above[second]):
            sides = ((first, second), (second, third), (first, third))
            if all(side in free for side in sides):
                free.difference_update(sides)
                forward, onward, across = (balance[side] > 0 for side in sides)
                cyclic += forward == onward != across
                total += 1
                break
    return cyclic, total
