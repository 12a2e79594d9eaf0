# SPDX-License-Identifier: Apache-2.0
"""Is SIPO less sensitive to beta than Diffusion-DPO? Three decades of beta (Fig. 1a and 8c of the SIPO paper).

    python benchmarks/paper/beta_sensitivity.py

Both methods at each beta, on pairs that the base could not have drawn and on its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import over_values
from protocol import BETAS, SOURCES, arm
from question import BASE, Question, ask

METHODS = ("DPO", "SIPO")


def label(method: str, beta: float, source: str) -> str:
    """The name of an arm."""
    return f"{method}, beta {beta:g}, {source.replace('_', '-')}"


def best(arms: Mapping[str, Any], method: str, source: str) -> str:
    """The beta that is best for a method by the first verifier, which ranked the pairs; claims are on the second."""
    labels = [label(method, beta, source) for beta in BETAS]
    return max(labels, key=lambda name: arms[name]["final"]["accuracy"]["mean"])


def at_their_best(arms: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """SIPO against Diffusion-DPO, each at its best beta."""
    return [(best(arms, "SIPO", source), best(arms, "DPO", source)) for source in SOURCES]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy, distance and masked share over beta."""
    lines = {
        f"{method}, {source.replace('_', '-')}": {beta: label(method, beta, source) for beta in BETAS}
        for source in SOURCES
        for method in METHODS
    }
    measures = ("second_accuracy", "frechet_distance", "masked_share")
    over_values(result, lines, measures, path, x_label="beta", x_scale="log")


ARMS = [(method, beta, source) for source in SOURCES for beta in BETAS for method in METHODS]
QUESTION = Question(
    "beta_sensitivity",
    "Sensitivity to beta",
    {label(*key): arm(key[0], key[1], source=key[2]) for key in ARMS},
    [
        *[(label(*key), BASE) for key in ARMS],
        *[(label("SIPO", beta, source), label("DPO", beta, source)) for source in SOURCES for beta in BETAS],
    ],
    late=at_their_best,
    draw=draw,
)

if __name__ == "__main__":
    ask(QUESTION)
