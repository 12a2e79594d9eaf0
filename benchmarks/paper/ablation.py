# SPDX-License-Identifier: Apache-2.0
"""What is owed to the mask, what to the weight, and what to beta? (Tables 1 and 2 of the SIPO paper, at matched beta)

    python benchmarks/paper/ablation.py

Diffusion-DPO, the mask alone, the weight alone, both (SIPO) and DPO-C&M, all at a small beta and all at a good one.
The paper compares methods at different betas (Table A1).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import over_steps
from options import guarded
from protocol import GOOD_BETA, SMALL_BETA, arm
from question import BASE, Question, ask

METHODS = ("DPO", "dynamic mask", "weight", "C&M", "SIPO")
AT = (SMALL_BETA, GOOD_BETA)


def label(method: str, beta: float) -> str:
    """The name of an arm."""
    return f"{method}, beta {beta:g}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Quality and masked share over steps, at the small beta."""
    labels = [label(method, SMALL_BETA) for method in METHODS]
    over_steps(result, labels, ("second_accuracy", "frechet_distance", "masked_share"), path)


#: Each component against Diffusion-DPO, and SIPO against what it adds to.
PAIRS = [*((method, "DPO") for method in METHODS[1:]), ("SIPO", "dynamic mask"), ("SIPO", "C&M")]
QUESTION = Question(
    "ablation",
    "Mask, weight and beta",
    {label(method, beta): arm(method, beta) for beta in AT for method in METHODS},
    [
        *[(label(one, beta), label(other, beta)) for beta in AT for one, other in PAIRS],
        (label("SIPO", SMALL_BETA), label("DPO", GOOD_BETA)),
        (label("DPO", GOOD_BETA), BASE),
        (label("SIPO", GOOD_BETA), BASE),
    ],
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
