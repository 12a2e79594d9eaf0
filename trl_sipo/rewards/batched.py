# SPDX-License-Identifier: Apache-2.0
"""What rewards of images by a model have in common: checks, batches, frames of videos, and their identity."""

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import PIL.Image
import torch

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.rewards.base import Media, RewardInfo
from trl_sipo.rewards.media import check_samples, check_scores, is_video, to_rgb, video_frames
from trl_sipo.rewards.weights import weights_hash


class BatchedReward(ABC):
    """Scores images in batches, and videos as the mean over some of their frames.

    A subclass says how a batch of RGB images is scored (`score_images`).

    Args:
        info: what the scores are.
        models: all whose weights the scores depend on, in eval mode.
        tokenizer: of transformers, if prompts go through one.
        settings: whatever else the scores depend on and `info` does not say, by name.
        batch_size: images at once.
        frames_per_video: how many evenly spaced frames of a video are scored; without it, videos are refused.

    Raises:
        ConfigurationError: a number below 1.
    """

    info: RewardInfo

    def __init__(
        self,
        info: RewardInfo,
        *,
        models: Sequence[torch.nn.Module] = (),
        tokenizer: Any = None,
        settings: dict[str, Any] | None = None,
        batch_size: int = 32,
        frames_per_video: int | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("frames_per_video", frames_per_video)):
            if value is not None and value < 1:
                raise ConfigurationError(f"`{name}` of {info.name} must be at least 1, got {value}.")
        if frames_per_video is not None:
            convention = f"{info.convention}; of a video the mean over {frames_per_video} frames"
            info = replace(info, convention=convention, media=info.media | {"video"})
        self.info = info
        self.batch_size, self.frames_per_video = batch_size, frames_per_video
        self._models, self._tokenizer, self._settings = tuple(models), tokenizer, settings or {}

    @abstractmethod
    def score_images(self, images: list[PIL.Image.Image], prompts: list[str]) -> torch.Tensor:
        """Scores of one batch.

        Args:
            images: RGB, b of them.
            prompts: one for each.

        Returns:
            (b,) floating point, on any device.
        """

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> torch.Tensor:
        """One score per sample; see `trl_sipo.rewards.base.Reward`.

        Raises:
            DatasetError: not one prompt per medium, another kind of medium, or a video without `frames_per_video`.
            RewardError: not one finite number per image.
        """
        check_samples(media, prompts, name=self.info.name)
        sums = torch.zeros(len(media), dtype=torch.float64)
        counts = torch.zeros(len(media), dtype=torch.float64)
        for batch in _batches(self._images(media), self.batch_size):
            samples = torch.tensor([sample for sample, _ in batch])
            its_prompts = [prompts[sample] for sample, _ in batch]
            with torch.inference_mode():
                scores = self.score_images([image for _, image in batch], its_prompts)
            check_scores(scores, its_prompts, name=self.info.name)
            sums.index_add_(0, samples, scores.double().cpu())
            counts.index_add_(0, samples, torch.ones(len(batch), dtype=torch.float64))
        return (sums / counts).float()

    def identity(self) -> dict[str, Any]:
        """All that a score is a function of, beside the medium and the prompt; takes seconds for large models."""
        return {
            "class": f"{type(self).__module__}:{type(self).__qualname__}",
            "package": import_module("trl_sipo").__version__,  # its lazy exports are of the layers above
            "name": self.info.name,
            "convention": self.info.convention,
            "settings": self._settings,
            "weights": weights_hash(self._models),
            "tokenizer": _tokenizer_hash(self._tokenizer),
        }

    def _images(self, media: Sequence[Media]) -> Iterator[tuple[int, PIL.Image.Image]]:
        """(number of the sample, RGB image) of every image and frame, decoded as they are needed."""
        for sample, medium in enumerate(media):
            if not is_video(medium):
                yield sample, to_rgb(medium, where=f"{self.info.name}, image {sample}")
            elif self.frames_per_video is None:
                raise DatasetError(
                    f"{self.info.name} scores images, and medium {sample} is a video. Set `frames_per_video` to score "
                    "the mean over that many of its frames."
                )
            else:
                yield from ((sample, frame) for frame in video_frames(medium, self.frames_per_video))


def _tokenizer_hash(tokenizer: Any) -> str | None:
    """SHA-256 of what a tokenizer knows, without how it cut and filled up the last texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    knowledge = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(knowledge, sort_keys=True).encode()).hexdigest()


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
