# SPDX-License-Identifier: Apache-2.0
"""Does it matter that the gradient flows through SIPO's weight? ("learnable importance weights", Sec. 3.2, SIPO paper)

    python benchmarks/paper/gradient_through_w.py

The weight with its gradient, and the same weight as a constant, at a small and at a good beta.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import over_steps
from options import guarded
from protocol import GOOD_BETA, SMALL_BETA, arm
from question import Question, ask

METHODS = ("SIPO", "SIPO, weight detached")
AT = (SMALL_BETA, GOOD_BETA)


def label(method: str, beta: float) -> str:
    """The name of an arm."""
    return f"{method}, beta {beta:g}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Quality and masked share over steps."""
    over_steps(result, list(result["arms"]), ("second_accuracy", "frechet_distance", "masked_share"), path)


QUESTION = Question(
    "gradient_through_w",
    "Gradient through the weight",
    {label(method, beta): arm(method, beta) for beta in AT for method in METHODS},
    [(label(METHODS[0], beta), label(METHODS[1], beta)) for beta in AT],
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
