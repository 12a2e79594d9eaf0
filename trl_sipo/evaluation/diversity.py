# SPDX-License-Identifier: Apache-2.0
"""What a reward does not see: whether a model still varies, and how far it went from its base.

A model that is trained for a reward can raise it by drawing one well-liked picture again and again. So variety and
drift stand beside every score. Both are distances between features of samples, and both are measured on the scale of
the base: 1 is the distance at which two samples of the base from one prompt lie.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.statistics import Clusters, Interval, by_cluster, clustered_interval
from trl_sipo.rewards.base import Media
from trl_sipo.rewards.clip_encoder import CLIPEncoder, load_encoder
from trl_sipo.rewards.pixels import cropped_pixels

Features = Callable[[Sequence[Media]], Tensor]
"""Media -> (n, features) float32."""

CLIP_MODEL = "openai/clip-vit-base-patch32"
_SIDE = 16
_FRAMES = 4


@dataclass(frozen=True)
class Variety:
    """How a candidate's samples lie beside the base's.

    Attributes:
        base_spread: Mean distance of two samples of one prompt, of the base, in the features' unit.
        relative_spread: The candidate's, divided by the base's; below 1 it varies less.
        drift: Mean distance between the candidate's sample and the base's from the same noise, divided by the base's
            spread: 0 is the same picture, 1 as far as another seed would be.
    """

    base_spread: float
    relative_spread: Interval
    drift: Interval


def pixel_features(media: Sequence[Media]) -> Tensor:
    """Colours on a 16 x 16 grid (of four frames of a video), (n, 768) or (n, 3072) float32 in [0, 1]; no weights.

    They see composition and colour, no meaning; [`CLIPFeatures`] see that.
    """
    return torch.stack([_grid(medium) for medium in media])


@dataclass(frozen=True)
class CLIPFeatures:
    """Image embeddings of a CLIP, of length 1; of a video, those of four frames. They see what is shown.

    Args:
        encoder: As `load_encoder` gives it.
    """

    encoder: CLIPEncoder

    @torch.inference_mode()
    def __call__(self, media: Sequence[Media]) -> Tensor:
        """(n, width) or (n, 4 * width) float32 on the CPU."""
        frames = [frame for medium in media for frame in _frames_of(medium)]
        pixels = cropped_pixels([frame.convert("RGB") for frame in frames], self.encoder.side)
        return self.encoder.images(pixels).cpu().reshape(len(media), -1)


def _grid(medium: Media) -> Tensor:
    small = [frame.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX) for frame in _frames_of(medium)]
    return torch.from_numpy(np.stack([np.asarray(frame, dtype=np.float32) for frame in small]) / 255).flatten()


def _frames_of(medium: Media) -> list[Image.Image]:
    """The image, or four frames of a video from its first to its last."""
    if isinstance(medium, Image.Image):
        return [medium]
    positions = np.linspace(0, len(medium) - 1, _FRAMES).round().astype(int)
    return [Image.fromarray(medium[position]) for position in positions]


def load_features(spec: str, device: Any = "cpu") -> tuple[Features, str]:
    """What variety and drift are measured on, and its name for reports.

    Args:
        spec: "pixels"; "clip", which takes `CLIP_MODEL`; or "clip:MODEL", a folder or hub id.
        device: Of CLIP.

    Raises:
        ConfigurationError: Another one, or weights that do not load.
    """
    kind, _, model = spec.partition(":")
    if spec == "pixels":
        return pixel_features, "colours on a 16 x 16 grid"
    if kind != "clip":
        raise ConfigurationError(f"`--features` must be pixels, clip or clip:MODEL, got {spec!r}.")
    model = model or CLIP_MODEL
    encoder = load_encoder(model, None, revision=None, unescape=False, device=device, dtype="float32")
    return CLIPFeatures(encoder), f"image embeddings of {model}"


def within_prompt_distances(features: Tensor, prompt_ids: Sequence[str]) -> tuple[list[float], list[str]]:
    """Euclidean distances of every two samples of one prompt, and the prompt of each."""
    groups: dict[str, list[int]] = {}
    for index, prompt_id in enumerate(prompt_ids):
        groups.setdefault(prompt_id, []).append(index)
    distances, owners = [], []
    for prompt_id, indices in groups.items():
        found = torch.pdist(features[indices].double()).tolist() if len(indices) > 1 else []
        distances += found
        owners += [prompt_id] * len(found)
    return distances, owners


def compare_variety(
    base: Tensor, candidate: Tensor, prompt_ids: Sequence[str], *, level: float = 0.95, num_resamples: int = 2000
) -> Variety:
    """Spread and drift of a candidate, in units of the base's spread.

    The intervals are those of the candidate's part; the base's spread is taken as it was measured.

    Args:
        base: (n, features).
        candidate: (n, features), of the samples from the same prompts and the same noise.
        prompt_ids: (n,).

    Raises:
        ConfigurationError: Sets that do not pair, one sample per prompt, or a base that draws one picture only.
    """
    if base.shape != candidate.shape or len(base) != len(prompt_ids):
        raise ConfigurationError(
            f"features {tuple(base.shape)} of the base, {tuple(candidate.shape)} of the candidate and "
            f"{len(prompt_ids)} prompts do not pair."
        )
    distances, owners = within_prompt_distances(base, prompt_ids)
    if not distances or max(distances) == 0:
        raise ConfigurationError(
            "The base's samples of a prompt do not differ, so that there is no scale for variety. Draw at least two "
            "samples of each prompt."
        )
    spread = float(np.mean(distances))
    own, own_owners = within_prompt_distances(candidate, prompt_ids)
    moved = (candidate.double() - base.double()).norm(dim=1).tolist()
    options = {"level": level, "num_resamples": num_resamples, "bounds": (0.0, np.inf)}
    return Variety(
        spread,
        clustered_interval(_scaled(by_cluster(own, own_owners), spread), **options),
        clustered_interval(_scaled(by_cluster(moved, prompt_ids), spread), **options),
    )


def _scaled(clusters: Clusters, unit: float) -> Clusters:
    return Clusters(clusters.sums / unit, clusters.counts)
