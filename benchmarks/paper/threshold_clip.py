# SPDX-License-Identifier: Apache-2.0
"""Which clip range, and which mask threshold? (Table A2 and Appendix F.1 of the SIPO paper)

    python benchmarks/paper/threshold_clip.py

The paper's epsilon moves both: weights are clipped to 1 +- epsilon, and masked below 1 - epsilon. One more arm
moves the mask alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import over_values
from options import guarded
from protocol import CLIP_RANGES, SMALL_BETA, arm
from question import BASE, Question, ask


def label(clip_range: float) -> str:
    """The name of an arm of the sweep."""
    return f"epsilon {clip_range:g}"


DEFAULT = label(0.1)
BOTH = label(0.5)
MASK_ALONE = "clip 0.1, mask below 0.5"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Quality and masked share over epsilon."""
    lines = {"SIPO": {clip_range: label(clip_range) for clip_range in CLIP_RANGES}}
    measures = ("second_accuracy", "frechet_distance", "masked_share")
    over_values(result, lines, measures, path, x_label="epsilon")


def with_clip(clip_range: float, **more: float):
    """SIPO at the small beta; the default is the same run as elsewhere."""
    if clip_range == 0.1 and not more:
        return arm("SIPO", SMALL_BETA)
    return arm("SIPO", SMALL_BETA, overrides={"clip_range": clip_range, **more})


QUESTION = Question(
    "threshold_clip",
    "Mask threshold and clip range",
    {
        **{label(clip_range): with_clip(clip_range) for clip_range in CLIP_RANGES},
        MASK_ALONE: with_clip(0.1, mask_threshold=0.5),
    },
    [
        *[(DEFAULT, label(clip_range)) for clip_range in CLIP_RANGES if clip_range != 0.1],
        (BOTH, MASK_ALONE),
        (MASK_ALONE, DEFAULT),
        *[(label(clip_range), BASE) for clip_range in CLIP_RANGES],
    ],
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
