# SPDX-License-Identifier: Apache-2.0
"""Rewards by name: the table, classes of one's own, and scorers outside of this process."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.base import Reward

REWARDS: dict[str, str] = {
    "aesthetic": "trl_sipo.rewards.aesthetic:AestheticScore",
    "brightness": "trl_sipo.rewards.programmatic:Brightness",
    "clipscore": "trl_sipo.rewards.clip_scores:CLIPScore",
    "colour_share": "trl_sipo.rewards.programmatic:ColourShare",
    "fashion": "trl_sipo.demo.rewards:FashionReward",
    "fashion-correct": "trl_sipo.demo.rewards:fashion_correct",
    "fashion-second": "trl_sipo.demo.rewards:fashion_second",
    "fashion-second-correct": "trl_sipo.demo.rewards:fashion_second_correct",
    "flicker": "trl_sipo.rewards.programmatic:Flicker",
    "grounding_dino_verifier": "trl_sipo.rewards.detection:grounding_dino_verifier",
    "hpsv2": "trl_sipo.rewards.clip_scores:HPSv2",
    "hpsv2.1": "trl_sipo.rewards.clip_scores:HPSv21",
    "image_reward": "trl_sipo.rewards.image_reward:ImageReward",
    "motion": "trl_sipo.rewards.programmatic:Motion",
    "moving-fashion": "trl_sipo.demo.rewards:MovingFashionReward",
    "moving-fashion-correct": "trl_sipo.demo.rewards:moving_fashion_correct",
    "moving-fashion-second": "trl_sipo.demo.rewards:moving_fashion_second",
    "moving-fashion-second-correct": "trl_sipo.demo.rewards:moving_fashion_second_correct",
    "owlv2_verifier": "trl_sipo.rewards.detection:owlv2_verifier",
    "pickscore": "trl_sipo.rewards.clip_scores:PickScore",
    "sharpness": "trl_sipo.rewards.programmatic:Sharpness",
    "symmetry": "trl_sipo.rewards.programmatic:Symmetry",
    "text_rendering": "trl_sipo.rewards.text_rendering:TextRendering",
}

_OUTSIDE = ("http://", "https://", "process:")


def load_reward(spec: str, *, device: Any = "cpu", **options: Any) -> Reward:
    """The reward that `spec` names, ready to score.

    Args:
        spec: a name of `REWARDS`; `"package.module:Class"` of your own, called with `options`, and with `device` if it
            takes one; or `"http://host:port/..."`, `"https://..."` and `"process:COMMAND"`, scorers outside of this
            process (`trl_sipo.rewards.outside`), which get `options` alone.
        device: where the weights go, as torch names it.
        options: of the class or scorer, such as `batch_size=8`.

    Raises:
        ConfigurationError: nothing has that name, the module or class is not there, it does not take the options, its
            weights cannot be loaded, or what it gives is no reward.
    """
    if spec.startswith(_OUTSIDE):
        from trl_sipo.rewards.outside import open_scorer

        return open_scorer(spec, **options)
    make = _find(REWARDS.get(spec, spec), spec)
    signature = inspect.signature(make)
    if "device" in signature.parameters:
        options = {"device": device, **options}
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigurationError(
            f"The reward {spec!r}: {error}. Its options: {', '.join(signature.parameters) or 'none'}."
        ) from error
    reward = make(**options)
    if not isinstance(reward, Reward):
        raise ConfigurationError(
            f"The reward {spec!r} gives a {type(reward).__name__}, which lacks `info` or `score(media, prompts)`; see "
            "`trl_sipo.rewards.base.Reward`."
        )
    return reward


def _find(target: str, spec: str) -> Callable[..., Any]:
    module_name, _, name = target.partition(":")
    if not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigurationError(
            f"There is no reward {spec!r}. Known: {', '.join(sorted(REWARDS))}; or give 'package.module:Class' of "
            "your own, 'http://host:port/...' or 'process:COMMAND'."
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigurationError(
            f"The reward {spec!r} cannot be imported: {error}. Install its package, or add its folder to PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise ConfigurationError(f"The reward {spec!r} cannot be found: {error}.") from error
    if not callable(found):
        raise ConfigurationError(f"The reward {spec!r} is no class or function but a {type(found).__name__}.")
    return found
