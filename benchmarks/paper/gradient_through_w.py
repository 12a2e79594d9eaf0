# SPDX-License-Identifier: Apache-2.0
"""Does it matter that the gradient flows through SIPO's weight? ("learnable importance weights", Sec. 3.2, SIPO paper)

    python benchmarks/paper/gradient_through_w.py

The weight with its gradient, and the same weight as a constant.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import over_steps
from protocol import SMALL_BETA, arm
from question import Question, ask, guarded

METHODS = ("SIPO", "SIPO, weight detached")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Quality and drift over steps."""
    over_steps(result, list(QUESTION.arms), ("second_accuracy", "frechet_distance", "held_out_chosen_error"), path)


QUESTION = Question(
    "gradient_through_w",
    "Gradient through the weight",
    {method: arm(method, SMALL_BETA) for method in METHODS},
    [METHODS],
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
