# SPDX-License-Identifier: Apache-2.0
"""Rewards of the pictures of sample grids: how quality moves while a run goes on."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.media import check_scores
from trl_sipo.rewards.registry import load_reward
from trl_sipo.trainer.processes import from_main

logger = logging.getLogger(__name__)


class SampleRewards:
    """Scores sample grids by some rewards, on the CPU: the memory of the accelerator is for training.

    Args:
        specs: As for [`~trl_sipo.rewards.registry.load_reward`].
        is_video: Whether the samples are videos.

    Raises:
        ConfigurationError: There is no such reward, it cannot be loaded, it does not take such samples, or two have
            one name.
    """

    def __init__(self, specs: Sequence[str], *, is_video: bool):
        self.is_video = is_video
        self.rewards: dict[str, Reward] = {}
        kind = "video" if is_video else "image"
        with torch.random.fork_rng(devices=[]):  # networks begin with random weights
            for spec in specs:
                reward = load_reward(spec, device="cpu")
                if kind not in reward.info.media:
                    raise ConfigurationError(
                        f"`sample_rewards` names {spec!r}, which scores {' and '.join(sorted(reward.info.media))}, "
                        f"but the samples are of the kind {kind!r}. Remove it."
                    )
                if reward.info.name in self.rewards:
                    raise ConfigurationError(
                        f"`sample_rewards={list(specs)}` hold two rewards of the name {reward.info.name!r}, under "
                        "which their scores would be logged. Remove one of them."
                    )
                self.rewards[reward.info.name] = reward

    def score(self, clips: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
        """The mean score by reward.

        Args:
            clips: One (frames, height, width, 3) uint8 per prompt.
            prompts: As many.

        Raises:
            DatasetError: A prompt, or a picture, that a reward cannot score.
            RewardError: A scorer failed, or gave something else than one finite number per picture.
        """
        media = list(clips) if self.is_video else [Image.fromarray(clip[0]) for clip in clips]
        means = {}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for name, reward in self.rewards.items():
                scores = torch.as_tensor(reward.score(media, prompts))
                check_scores(scores, prompts, name=name)
                means[name] = float(scores.mean())
        return means

    def close(self) -> None:
        """Let scorers outside of this process go; a later call of `score` starts them again."""
        for reward in self.rewards.values():
            close = getattr(reward, "close", None)
            if close is not None:
                close()


def open_sample_rewards(args: Any) -> SampleRewards | None:
    """The rewards that the settings ask for, on the main process, which draws the grids; every process must call it.

    Raises:
        ConfigurationError: See [`SampleRewards`]; on all processes.
    """
    if not args.sample_rewards:
        return None
    opened: list[SampleRewards] = []
    # What is returned would be sent to the other processes, and these are networks.
    from_main(lambda: opened.append(SampleRewards(args.sample_rewards, is_video=args.num_frames > 1)))
    return opened[0] if opened else None
