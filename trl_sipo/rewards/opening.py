# SPDX-License-Identifier: Apache-2.0
"""Several rewards at once, with a cache of their scores, closed when they are not needed any more."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.cache import CachedReward
from trl_sipo.rewards.registry import load_reward


def open_rewards(
    specs: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    *,
    cache: Path,
    device: Any,
    stack: ExitStack,
) -> list[Reward]:
    """Rewards ready to score; those outside of this process end with `stack`.

    Scores are cached of those that say what they are a function of (`identity()`), as all of this package do.

    Args:
        specs: As for [`load_reward`].
        options: Of the rewards that have some, by specification.
        cache: The file of scores.
        device: Of the rewards' weights.

    Raises:
        ConfigurationError: See [`load_reward`].
    """
    rewards: list[Reward] = []
    for spec in specs:
        reward = load_reward(spec, device=device, **options.get(spec, {}))
        close = getattr(reward, "close", None)
        if close is not None:
            stack.callback(close)
        rewards.append(CachedReward(reward, cache) if hasattr(reward, "identity") else reward)
    return rewards
