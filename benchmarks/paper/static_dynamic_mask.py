# SPDX-License-Identifier: Apache-2.0
"""Is it enough to leave out the cleanest levels, or must the mask follow the policy? (Fig. 2, Sec. 3.1, SIPO paper)

    python benchmarks/paper/static_dynamic_mask.py

No weights in any arm. One static mask is the paper's, of t below 60. The other is of the levels at which the base's
weight is below 0.9 on the grid of these runs, which is coarser: it leaves out what the dynamic mask does at the start.
The control keeps as many pairs of each batch as the dynamic mask, but dealt out by chance: the brake that the mask is,
without its choice.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import over_steps
from options import guarded
from protocol import SMALL_BETA, arm
from question import BASE, Question, ask

DPO, DYNAMIC, RANDOM = "DPO", "dynamic mask", "random mask at its rate"
STATIC, WIDE = "static mask, t from 60", "static mask, t from 360"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Quality, rewards and masked share over steps."""
    measures = ("second_accuracy", "frechet_distance", "masked_share", "held_out_chosen", "held_out_rejected")
    over_steps(result, list(QUESTION.arms), (*measures, "held_out_margins"), path)


QUESTION = Question(
    "static_dynamic_mask",
    "Static and dynamic mask",
    {
        DPO: arm("DPO", SMALL_BETA),
        STATIC: arm("static mask", SMALL_BETA),
        WIDE: arm("wide static mask", SMALL_BETA),
        DYNAMIC: arm("dynamic mask", SMALL_BETA),
        RANDOM: arm("dynamic mask", SMALL_BETA, random_mask=True),
    },
    [
        (STATIC, DPO),
        (DYNAMIC, DPO),
        (DYNAMIC, STATIC),
        (WIDE, DPO),
        (DYNAMIC, WIDE),
        (DYNAMIC, RANDOM),
        (RANDOM, DPO),
        *[(name, BASE) for name in (DPO, STATIC, WIDE, DYNAMIC, RANDOM)],
    ],
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
