# SPDX-License-Identifier: Apache-2.0
"""What a reward is: it scores images or videos against their prompts. One small protocol, whatever computes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

Media: TypeAlias = Image.Image | np.ndarray
"""An image of any mode, or a video: uint8 (frames, height, width, 3), RGB."""


@dataclass(frozen=True)
class RewardInfo:
    """What has to be said beside a score, so that it can be compared with others.

    Attributes:
        name: Short, for columns of tables, such as "pickscore".
        convention: What the number is, as a formula, such as "exp(logit_scale) * cos(image, text)".
        licence: Of the weights and of the code, such as "MIT".
        higher_is_better: Whether a larger score is a better sample.
        media: Which of "image" and "video" it takes.
    """

    name: str
    convention: str
    licence: str
    higher_is_better: bool = True
    media: frozenset[str] = frozenset({"image"})


@runtime_checkable
class Reward(Protocol):
    """Scores media against prompts."""

    info: RewardInfo

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Tensor:
        """One score per sample, in the reward's own unit.

        Args:
            media: Images or videos, n of them.
            prompts: One per sample.

        Returns:
            (n,) float32 on the CPU, finite.

        Raises:
            DatasetError: A medium or a prompt that this reward cannot score.
            RewardError: The scorer failed.
        """
        ...
