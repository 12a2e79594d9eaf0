# SPDX-License-Identifier: Apache-2.0
"""Resize, crop and flip, the same for both images of a pair. PIL and torch only."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from trl_sipo.errors import ConfigurationError


@dataclass(frozen=True)
class PairedTransform:
    """Two RGB images to two tensors, with one crop and one flip for both.

    The shorter side is resized to `resolution` (Lanczos with antialiasing, upwards too) and a square is cropped. Both
    arms get the same position of the crop, relative to the room that each has: the same pixels when their sizes are
    equal, the same place in the picture when they are not. Otherwise the model would learn from the crop which image
    was preferred.

    Args:
        resolution: height and width of the result, in pixels.
        center_crop: crop the centre; False: a random place.
        random_flip: mirror both arms with probability 1/2.

    Raises:
        ConfigurationError: `resolution` is not a positive integer.
    """

    resolution: int
    center_crop: bool = True
    random_flip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.resolution, bool) or not isinstance(self.resolution, int) or self.resolution < 1:
            raise ConfigurationError(f"resolution must be a positive number of pixels, found {self.resolution!r}")

    @property
    def is_random(self) -> bool:
        return self.random_flip or not self.center_crop

    def for_evaluation(self) -> "PairedTransform":
        """The same resolution without randomness: centre crop, no flip."""
        return replace(self, center_crop=True, random_flip=False)

    def __call__(
        self, chosen: Image.Image, rejected: Image.Image, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a pair.

        Args:
            chosen: RGB image of any size.
            rejected: RGB image of any size.
            generator: a CPU generator; may be None only when nothing is random.

        Returns:
            Two float32 tensors (3, resolution, resolution) in [-1, 1].

        Raises:
            ConfigurationError: a random crop or flip without a generator.
        """
        left, top, flip = 0.5, 0.5, False
        if self.is_random:
            if generator is None:
                raise ConfigurationError("a random crop or flip needs a torch.Generator; for_evaluation() needs none")
            draws = torch.rand(3, generator=generator).tolist()  # all three always, so that options do not interact
            left, top = (0.5, 0.5) if self.center_crop else (draws[0], draws[1])
            flip = self.random_flip and draws[2] < 0.5
        return self._apply(chosen, left, top, flip), self._apply(rejected, left, top, flip)

    def _apply(self, image: Image.Image, left: float, top: float, flip: bool) -> torch.Tensor:
        # Cropping within the resize gives the pixels of "resize, then crop" without ever holding the resized image,
        # which for a very long and narrow one would not fit in memory.
        side = min(image.width, image.height)
        x, y = left * (image.width - side), top * (image.height - side)
        square = (self.resolution, self.resolution)
        image = image.resize(square, Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image_to_tensor(image)


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as a float32 tensor (3, height, width) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    tensor = torch.empty(3, image.height, image.width, dtype=torch.float32)
    tensor.copy_(pixels.permute(2, 0, 1))  # in one pass: to(float32).contiguous() takes several times as long
    return tensor.div_(127.5).sub_(1.0)
