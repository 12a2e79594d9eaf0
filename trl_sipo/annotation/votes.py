# SPDX-License-Identifier: Apache-2.0
"""From single answers to one verdict per pair: majority within a group, then across groups. Pure.

SIPO paper, appendix E.3: "Within each group, we first aggregate the 4 individual labels by majority vote [...]. In
case of a tie among the 4 annotators, the group level label is recorded as a tie. [...] If the three group level labels
do not produce a strict majority, the comparison is counted as a final tie." So the first stage takes the label that
was given most often, and a shared lead is a tie; the second takes a label that more than half of the groups have.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trl_sipo.annotation.records import LEFT, MIRRORED, SAMPLE, SKIP, TIE, Answer, Comparison, Rater

FIRST, SECOND = "first", "second"
LABELS: Final = (FIRST, SECOND, TIE)


@dataclass(frozen=True)
class Judgement:
    """A rater's last word on an assignment.

    Attributes:
        rater: Whose.
        pair_id: Of the pair.
        kind: "sample", "gold" or "mirrored".
        choice: "left", "right" or "tie".
        is_flipped: The first of the pair was on the right.
        seconds: Spent on it, earlier answers to the same assignment included.
    """

    rater: Rater
    pair_id: str
    kind: str
    choice: str
    is_flipped: bool
    seconds: float

    @property
    def label(self) -> str:
        """ "first", "second" or "tie": what was chosen, whatever side it was on."""
        if self.choice == TIE:
            return TIE
        return FIRST if (self.choice == LEFT) != self.is_flipped else SECOND


@dataclass(frozen=True)
class PairVote:
    """What was made of all answers to a pair.

    Attributes:
        pair: Which.
        counts: Label -> answers, (first, second, tie).
        group_labels: Group -> its label; groups without an answer are not in it.
        label: The final one.
    """

    pair: Comparison
    counts: Mapping[str, int]
    group_labels: Mapping[int, str]
    label: str

    @property
    def num_answers(self) -> int:
        """Of all raters."""
        return sum(self.counts.values())

    @property
    def share_of_second(self) -> float:
        """Of the answers, in [0, 1]; a tie counts one half."""
        return (self.counts[SECOND] + self.counts[TIE] / 2) / self.num_answers


def last_judgements(answers: Iterable[Answer]) -> list[Judgement]:
    """The last answer to each assignment, without those that end with "skip".

    Args:
        answers: In the order in which they came.
    """
    last: dict[str, Answer] = {}
    seconds: dict[str, float] = defaultdict(float)
    for answer in answers:
        last[answer.assignment_id] = answer
        seconds[answer.assignment_id] += answer.seconds
    return [
        Judgement(
            rater=answer.rater,
            pair_id=answer.task.pair_id,
            kind=answer.task.kind,
            choice=answer.choice,
            is_flipped=answer.task.is_flipped,
            seconds=seconds[assignment_id],
        )
        for assignment_id, answer in last.items()
        if answer.choice != SKIP
    ]


def group_label(labels: Sequence[str]) -> str:
    """The label that was given most often within a group; a tie where two lead.

    >>> group_label(["first", "first", "second", "tie"]), group_label(["first", "first", "second", "second"])
    ('first', 'tie')
    """
    (label, most), *others = Counter(labels).most_common()
    return TIE if others and others[0][1] == most else label


def final_label(labels: Sequence[str]) -> str:
    """The label that more than half of the groups have; else a tie.

    >>> final_label(["first", "first", "second"]), final_label(["first", "second", "tie"])
    ('first', 'tie')
    """
    label, most = Counter(labels).most_common(1)[0]
    return label if 2 * most > len(labels) else TIE


def votes(pairs: Iterable[Comparison], judgements: Iterable[Judgement]) -> list[PairVote]:
    """The verdict on every pair that somebody judged.

    Args:
        pairs: Those of interest, gold ones not among them.
        judgements: Only those of the kind "sample" count: a mirrored repeat would give its rater two voices.
    """
    by_pair: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for judgement in judgements:
        if judgement.kind == SAMPLE:
            by_pair[judgement.pair_id][judgement.rater.group].append(judgement.label)
    found = []
    for pair in pairs:
        if (groups := by_pair.get(pair.pair_id)) is not None:
            counts = Counter(label for labels in groups.values() for label in labels)
            group_labels = {group: group_label(labels) for group, labels in sorted(groups.items())}
            found.append(
                PairVote(
                    pair=pair,
                    counts={label: counts[label] for label in LABELS},
                    group_labels=group_labels,
                    label=final_label(list(group_labels.values())),
                )
            )
    return found


def worth(label: str) -> float:
    """What a label is worth to the second of a pair: 1 of a win, 0 of a loss, one half of a tie."""
    return {FIRST: 0.0, SECOND: 1.0, TIE: 0.5}[label]


def mirrored_labels(judgements: Iterable[Judgement]) -> list[tuple[str, str]]:
    """A rater's labels of pairs that came twice, (of the first time, of the mirrored repeat)."""
    first: dict[tuple[int, str], str] = {}
    second: dict[tuple[int, str], str] = {}
    for judgement in judgements:
        place = {SAMPLE: first, MIRRORED: second}.get(judgement.kind)
        if place is not None:
            place[judgement.rater.rater_id, judgement.pair_id] = judgement.label
    return [(first[key], label) for key, label in second.items() if key in first]
