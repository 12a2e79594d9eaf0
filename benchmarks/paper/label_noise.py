# SPDX-License-Identifier: Apache-2.0
"""Does Poly-DPO's alpha help against wrong labels? (Fig. 4 of the ViPO paper)

    python benchmarks/paper/label_noise.py

Training labels are exchanged at several rates; held-out pairs and verifiers stay clean. alpha 0 is Diffusion-DPO.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import over_values
from options import guarded
from protocol import ALPHAS, FLIP_RATES, GOOD_BETA, arm
from question import BASE, Question, ask
from runs import Run


def label(alpha: float, rate: float) -> str:
    """The name of an arm."""
    return f"alpha {alpha:g}, {rate:.0%} flipped"


def make(alpha: float, rate: float) -> Run:
    """Poly-DPO; at alpha 0 Diffusion-DPO, with clean labels the same run as elsewhere."""
    if alpha == 0:
        return arm("DPO", GOOD_BETA, flip_rate=rate)
    return arm("Poly-DPO", GOOD_BETA, overrides={"poly_alpha": alpha}, flip_rate=rate)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Quality over alpha, one line per rate of wrong labels."""
    lines = {f"{rate:.0%} flipped": {alpha: label(alpha, rate) for alpha in ALPHAS} for rate in FLIP_RATES}
    measures = ("second_accuracy", "frechet_distance", "held_out_accuracies")
    over_values(result, lines, measures, path, x_label="alpha")


QUESTION = Question(
    "label_noise",
    "Wrong labels and alpha",
    {label(alpha, rate): make(alpha, rate) for rate in FLIP_RATES for alpha in ALPHAS},
    [
        *[(label(alpha, rate), label(0.0, rate)) for rate in FLIP_RATES for alpha in ALPHAS if alpha != 0],
        *[(label(0.0, rate), BASE) for rate in FLIP_RATES],
    ],
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
