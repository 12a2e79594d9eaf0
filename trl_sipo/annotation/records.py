# SPDX-License-Identifier: Apache-2.0
"""What a study consists of: plain values, without a file or a server."""

from dataclasses import dataclass
from typing import Final

LEFT, RIGHT, TIE, SKIP = "left", "right", "tie", "skip"
CHOICES: Final = (LEFT, RIGHT, TIE)
SAMPLE, GOLD, MIRRORED = "sample", "gold", "mirrored"

QUESTION: Final = "Which result is better overall?"
LABEL_TITLE: Final = "Label"  # of a label session
# After the instruction of the SIPO paper, appendix E.3.
GUIDELINES: Final = """\
Given the text prompt, choose the result that is better overall. Consider both how well it matches the text, and its \
visual quality, including clarity and the absence of artifacts.
If you find the two results essentially indistinguishable by these criteria, choose "tie".
Work alone, and do not discuss your choices with others. Take breaks as you need: your place is kept."""


@dataclass(frozen=True)
class Study:
    """What all raters of a study share.

    Attributes:
        title, guidelines, question: Texts for the raters; line breaks of the guidelines are paragraphs.
        categories: Of the prompts, in the order of a report; may be empty.
        is_blind: Raters do not learn which model is which.
        allows_tie: Whether "tie" is an answer.
        seed: Of every rater's sides and order. Who knows it and the pairs could work out the sides: keep it to
            yourself while the study is running.
        tasks_per_rater: Pairs that a rater gets; None: all. A group as a whole goes through all of them.
        num_mirrored: Of these, how many come a second time with the sides exchanged.
    """

    title: str
    guidelines: str = GUIDELINES
    question: str = QUESTION
    categories: tuple[str, ...] = ()
    is_blind: bool = True
    allows_tie: bool = True
    seed: int = 0
    tasks_per_rater: int | None = None
    num_mirrored: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two samples of one prompt; which of them a rater sees on the left is the assignment's.

    Attributes:
        pair_id: Its name in the study.
        prompt_id: Of the prompt, which other pairs may share.
        prompt, category: Texts; the category may be empty.
        first_model, second_model: Names.
        first_media, second_media: Names of files in the study's media folder.
        is_video: Of both.
        is_gold: The answer is known: the first is better.
    """

    pair_id: str
    prompt_id: str
    prompt: str
    category: str
    first_model: str
    second_model: str
    first_media: str
    second_media: str
    is_video: bool = False
    is_gold: bool = False

    @property
    def models(self) -> tuple[str, str]:
        """Of the first and the second."""
        return self.first_model, self.second_model


@dataclass(frozen=True)
class Rater:
    """Somebody who answers.

    Attributes:
        rater_id: In this study.
        name: As whoever runs the study calls them.
        group: From 1.
    """

    rater_id: int
    name: str
    group: int


@dataclass(frozen=True)
class Assignment:
    """A pair as one rater sees it: nothing in it tells what it is for, or whose the samples are.

    Attributes:
        assignment_id: A random text.
        position: In this rater's own order, from 0.
        prompt, category: Texts; the category may be empty.
        left_media, right_media: Names of files in the study's media folder.
        is_video: Of both.
    """

    assignment_id: str
    position: int
    prompt: str
    category: str
    left_media: str
    right_media: str
    is_video: bool


@dataclass(frozen=True)
class Task:
    """What an assignment is for; no rater sees it.

    Attributes:
        pair_id: Of the pair.
        kind: "sample"; "gold", whose answer is known; or "mirrored", a pair that this rater has seen already.
        is_flipped: The first of the pair is on the right.
    """

    pair_id: str
    kind: str
    is_flipped: bool


@dataclass(frozen=True)
class Answer:
    """An answer as it was stored, with what it was about.

    Attributes:
        answer_id: From 1, in the order in which answers came.
        rater: Who answered.
        assignment_id: Of which.
        position: Of the assignment in the rater's order.
        task: What the assignment is for.
        choice: "left", "right", "tie" or "skip".
        seconds: Spent on it, as the page measured.
        answered_at: Seconds since 1970, UTC.
    """

    answer_id: int
    rater: Rater
    assignment_id: str
    position: int
    task: Task
    choice: str
    seconds: float
    answered_at: float
