# SPDX-License-Identifier: Apache-2.0
"""What every reward does with media before it scores them, and with the scores: checks, frames, RGB pixels, a hash."""

import hashlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from trl_sipo.data.images import open_image
from trl_sipo.errors import DatasetError, RewardError
from trl_sipo.rewards.base import Media


def check_samples(media: Sequence[Media], prompts: Sequence[str], *, name: str) -> None:
    """Refuse what is not one prompt per image or video.

    Args:
        media: images and videos.
        prompts: one for each.
        name: of the reward, for the error.

    Raises:
        DatasetError: another number of prompts than of media, or a medium or prompt of another kind.
    """
    if len(media) != len(prompts):
        raise DatasetError(
            f"{name} got {len(media)} images or videos and {len(prompts)} prompts; give one prompt for each of them."
        )
    for number, (medium, prompt) in enumerate(zip(media, prompts, strict=True)):
        if not isinstance(prompt, str):
            raise DatasetError(f"{name}: prompt {number} is no text but a {type(prompt).__name__}.")
        if not isinstance(medium, PIL.Image.Image) and not is_video(medium):
            shown = f"{medium.dtype} array {medium.shape}" if isinstance(medium, np.ndarray) else type(medium).__name__
            raise DatasetError(
                f"{name}: medium {number} is neither a PIL image nor a video, a uint8 array (frames, height, width, "
                f"3) with at least one frame, but a {shown}."
            )


def check_scores(scores: torch.Tensor, prompts: Sequence[str], *, name: str) -> None:
    """Refuse what is not one finite number per sample.

    Args:
        scores: what a reward gave.
        prompts: of the samples that it was given.
        name: of the reward, for the error.

    Raises:
        RewardError: another shape, or NaN or infinity among them.
    """
    count = len(prompts)
    if scores.shape != (count,):
        raise RewardError(f"{name} gave scores of shape {tuple(scores.shape)} for {count} samples, not ({count},).")
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"{name} gave {scores[bad[0]].item()} for the prompt {prompts[bad[0]]!r}; {len(bad)} of {count} scores "
            "are not finite. Of a model in half precision, try `dtype='float32'`."
        )


def is_video(medium: object) -> bool:
    """Whether it is a uint8 array (frames, height, width, 3) with something in it."""
    return (
        isinstance(medium, np.ndarray)
        and medium.dtype == np.uint8
        and medium.ndim == 4
        and medium.shape[-1] == 3
        and medium.size > 0
    )


def to_rgb(image: PIL.Image.Image, *, where: str = "the image") -> PIL.Image.Image:
    """The 8-bit RGB image that training would see: upright by EXIF, transparency on white (`trl_sipo.data.images`).

    Raises:
        DatasetError: a pixel format without an agreed range, or a file that breaks off.
    """
    return open_image(image, where=where)


def video_frames(video: np.ndarray, count: int) -> list[PIL.Image.Image]:
    """`count` frames of a video, or all if it has fewer: the middles of as many equal parts of it."""
    total = len(video)
    count = min(count, total)
    return [PIL.Image.fromarray(video[(2 * part + 1) * total // (2 * count)]) for part in range(count)]


def content_hash(medium: Media) -> bytes:
    """SHA-256 of the decoded RGB pixels and their layout: the same for a PNG and a WebP of the same picture.

    Raises:
        DatasetError: as `to_rgb`.
    """
    pixels = medium if isinstance(medium, np.ndarray) else np.asarray(to_rgb(medium))
    layout = f"{pixels.dtype}{pixels.shape}".encode()
    return hashlib.sha256(layout + np.ascontiguousarray(pixels).tobytes()).digest()
