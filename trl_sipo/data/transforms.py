# SPDX-License-Identifier: Apache-2.0
"""Resize, crop and flip, the same for both arms of a pair and for all frames. PIL and torch only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from trl_sipo.errors import ConfigurationError

Media = Image.Image | Sequence[Image.Image]


@dataclass(frozen=True)
class PairedTransform:
    """A pair of RGB images or of clips to two tensors, with one crop and one flip for both arms and all frames.

    The picture is resized until it covers height and width (Lanczos with antialiasing, upwards too) and what goes
    beyond is cropped. Both arms get the same position of the crop, relative to the room that each has: the same pixels
    when their sizes are equal, the same place in the picture when they are not. Otherwise the model would learn from
    the crop which image was preferred.

    Args:
        resolution: of the result, in pixels: the side of a square, or (height, width).
        center_crop: crop the centre; False: a random place.
        random_flip: mirror both arms with probability 1/2.

    Raises:
        ConfigurationError: `resolution` is not made of positive integers.
    """

    resolution: int | tuple[int, int]
    center_crop: bool = True
    random_flip: bool = False

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(_is_positive_integer(side) for side in self.size):
            raise ConfigurationError(
                "resolution must be a positive number of pixels, or a pair of them, (height, width); found "
                f"{self.resolution!r}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        if isinstance(self.resolution, tuple | list):
            return tuple(self.resolution)
        return (self.resolution, self.resolution)

    @property
    def is_random(self) -> bool:
        return self.random_flip or not self.center_crop

    def for_evaluation(self) -> "PairedTransform":
        """The same resolution without randomness: centre crop, no flip."""
        return replace(self, center_crop=True, random_flip=False)

    def __call__(
        self, chosen: Media, rejected: Media, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a pair.

        Args:
            chosen: an RGB image of any size, or a list of them: the frames of a clip, all of one size.
            rejected: likewise.
            generator: a CPU generator; may be None only when nothing is random.

        Returns:
            Two float32 tensors in [-1, 1]: (3, height, width) for an image, (3, frames, height, width) for a clip.

        Raises:
            ConfigurationError: a random crop or flip without a generator.
        """
        first, second = self.of_arms((chosen, rejected), generator)
        return first, second

    def of_arms(self, arms: Iterable[Media], generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Transform the arms of a sample, one or several, all with the same crop and flip; as `__call__`."""
        left, top, flip = 0.5, 0.5, False
        if self.is_random:
            if generator is None:
                raise ConfigurationError("a random crop or flip needs a torch.Generator; for_evaluation() needs none")
            draws = torch.rand(3, generator=generator).tolist()  # all three always, so that options do not interact
            left, top = (0.5, 0.5) if self.center_crop else (draws[0], draws[1])
            flip = self.random_flip and draws[2] < 0.5
        return [self._apply(media, left, top, flip) for media in arms]

    def centred(self, media: Media) -> torch.Tensor:
        """One arm, cropped at the centre and not mirrored."""
        return self._apply(media, 0.5, 0.5, False)

    def _apply(self, media: Media, left: float, top: float, flip: bool) -> torch.Tensor:
        if isinstance(media, Image.Image):
            return image_to_tensor(self._picture(media, left, top, flip))
        clip = torch.empty(3, len(media), *self.size)
        for number, frame in enumerate(media):
            clip[:, number] = image_to_tensor(self._picture(frame, left, top, flip))
        return clip

    def _picture(self, image: Image.Image, left: float, top: float, flip: bool) -> Image.Image:
        # Cropping within the resize gives the pixels of "resize, then crop" without ever holding the resized image,
        # which for a very long and narrow one would not fit in memory.
        height, width = self.size
        box_width = min(image.width, image.height * width / height)
        box_height = min(image.height, image.width * height / width)
        x, y = left * (image.width - box_width), top * (image.height - box_height)
        box = (x, y, x + box_width, y + box_height)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as a float32 tensor (3, height, width) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    tensor = torch.empty(3, image.height, image.width, dtype=torch.float32)
    tensor.copy_(pixels.permute(2, 0, 1))  # in one pass: to(float32).contiguous() takes several times as long
    return tensor.div_(127.5).sub_(1.0)


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
