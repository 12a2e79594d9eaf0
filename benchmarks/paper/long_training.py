# SPDX-License-Identifier: Apache-2.0
"""Does Diffusion-DPO gain first and collapse later, and do DPO-C&M and SIPO hold? (Table 1, Fig. 1b, 1c, 8a, 8b)

    python benchmarks/paper/long_training.py

At one small beta, and Diffusion-DPO at that which the paper gives it; measured on the way. Shorter runs at other
betas: `beta_sensitivity.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import over_steps
from options import guarded
from protocol import EVAL_EVERY, LONG_STEPS, OWN_BETA, SMALL_BETA, arm
from question import BASE, Question, ask

DPO, C_AND_M, SIPO = (f"{method}, beta {SMALL_BETA:g}" for method in ("DPO", "C&M", "SIPO"))
DPO_OWN = f"DPO, beta {OWN_BETA:g}"
EARLY = EVAL_EVERY


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Quality, rewards, drift and masked share over steps."""
    measures = ("second_accuracy", "frechet_distance", "diversity", "held_out_chosen_error", "masked_share")
    over_steps(result, list(QUESTION.arms), measures, path)


QUESTION = Question(
    "long_training",
    "Long training",
    {
        DPO: arm("DPO", SMALL_BETA, steps=LONG_STEPS),
        C_AND_M: arm("C&M", SMALL_BETA, steps=LONG_STEPS),
        SIPO: arm("SIPO", SMALL_BETA, steps=LONG_STEPS),
        DPO_OWN: arm("DPO", OWN_BETA, steps=LONG_STEPS),
    },
    [
        (f"{DPO}@{EARLY}", BASE),
        (DPO, BASE),
        (DPO, f"{DPO}@{EARLY}"),
        *[(name, BASE) for name in (C_AND_M, SIPO, DPO_OWN)],
        *[(name, f"{name}@{EARLY}") for name in (C_AND_M, SIPO, DPO_OWN)],
        (SIPO, DPO),
        (SIPO, DPO_OWN),
        (C_AND_M, DPO),
        (SIPO, C_AND_M),
    ],
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
