# SPDX-License-Identifier: Apache-2.0
"""The prompts of the demo's models as prompt sets: every garment in every colour, and those kept from training."""

from __future__ import annotations

from trl_sipo.demo.fashion import CLASSES, all_prompts, split_prompts
from trl_sipo.demo.video.sprites import all_video_prompts, split_video_prompts
from trl_sipo.errors import ConfigurationError

_PARTS = ("train", "held-out")


def fashion_prompts(part: str | None = None) -> list[tuple[str, str]]:
    """Prompts such as "a red sneaker", each with its class.

    Args:
        part: "train" for the 48 of preference training, "held-out" for the 16 others, None for all 64.

    Raises:
        ConfigurationError: Another part.
    """
    parts = {None: all_prompts(), **dict(zip(_PARTS, split_prompts(), strict=True))}
    return [(prompt.text, CLASSES[prompt.class_id]) for prompt in parts[_known(part)]]


def moving_fashion_prompts(part: str | None = None) -> list[tuple[str, str]]:
    """Prompts such as "a red sneaker moving left", each with its class; see `fashion_prompts`."""
    parts = {None: all_video_prompts(), **dict(zip(_PARTS, split_video_prompts(), strict=True))}
    return [(prompt.text, CLASSES[prompt.garment.class_id]) for prompt in parts[_known(part)]]


def _known(part: str | None) -> str | None:
    if part is not None and part not in _PARTS:
        raise ConfigurationError(f"the demo's prompts have no part {part!r}; they have {', '.join(_PARTS)}.")
    return part
