# SPDX-License-Identifier: Apache-2.0
"""Is SIPO less sensitive to beta than Diffusion-DPO? Three decades of beta (Fig. 1a and 8c of the SIPO paper).

    python benchmarks/paper/beta_sensitivity.py

Both methods at each beta, on pairs that the base could not have drawn. The base's own samples: `on_off_policy.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import over_values
from options import guarded
from protocol import BETAS, arm
from question import BASE, Question, ask

METHODS = ("DPO", "SIPO")


def label(method: str, beta: float) -> str:
    """The name of an arm."""
    return f"{method}, beta {beta:g}"


def best(arms: Mapping[str, Any], method: str) -> str:
    """The beta that is best for a method by the first verifier, which ranked the pairs; claims are on the second."""
    labels = [label(method, beta) for beta in BETAS]
    return max(labels, key=lambda name: arms[name]["final"]["accuracy"]["mean"])


def at_their_best(arms: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """SIPO against Diffusion-DPO, each at its best beta."""
    return [(best(arms, "SIPO"), best(arms, "DPO"))]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy, distance and masked share over beta."""
    lines = {method: {beta: label(method, beta) for beta in BETAS} for method in METHODS}
    measures = ("second_accuracy", "frechet_distance", "masked_share")
    over_values(result, lines, measures, path, x_label="beta", x_scale="log")


ARMS = [(method, beta) for beta in BETAS for method in METHODS]
QUESTION = Question(
    "beta_sensitivity",
    "Sensitivity to beta",
    {label(*key): arm(*key) for key in ARMS},
    [*[(label(*key), BASE) for key in ARMS], *[(label("SIPO", beta), label("DPO", beta)) for beta in BETAS]],
    late=at_their_best,
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
