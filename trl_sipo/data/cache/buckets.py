# SPDX-License-Identifier: Apache-2.0
"""Buckets: media of several aspect ratios, each brought to the nearest of a few sizes of about the same area.

Each arm of a pair goes to the bucket nearest to its own shape. A batch holds pairs of the same two buckets.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trl_sipo.data.seeding import seeded_generator
from trl_sipo.data.transforms import Media, PairedTransform

MAX_ASPECT_RATIO = 2.0

Size = tuple[int, int]


def bucket_sizes(size: Size, multiple: int, max_ratio: float = MAX_ASPECT_RATIO) -> tuple[Size, ...]:
    """For every width, in steps of `multiple`, the tallest height that keeps to the area of `size`; and lying as well.

    Of 512 x 512 with multiples of 64: 640 x 384, 576 x 448, 512 x 512, 448 x 576 and 384 x 640.

    Args:
        size: height and width in pixels, whose area is the budget.
        multiple: what heights and widths are multiples of.
        max_ratio: of the longer side to the shorter one.
    """
    budget = size[0] * size[1]
    widest = int(math.sqrt(budget * max_ratio)) // multiple * multiple
    found = set()
    for width in range(multiple, max(widest, multiple) + 1, multiple):
        height = budget // width // multiple * multiple
        if height and max(height / width, width / height) <= max_ratio:
            found |= {(height, width), (width, height)}
    return tuple(sorted(found | {size}))


def nearest_bucket(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size of the nearest aspect ratio, of several the largest."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0]) - ratio), -size[0] * size[1]))


def picture_size(media: Media) -> Size:
    """Height and width of an image, or of a clip's frames."""
    picture = media[0] if isinstance(media, Sequence) else media
    return picture.height, picture.width


@dataclass(frozen=True)
class BucketTransform:
    """A pair to two tensors, each of the size of its own bucket, cropped at the centre.

    Args:
        sizes: the buckets.
    """

    sizes: tuple[Size, ...]

    def __call__(
        self, chosen: Media, rejected: Media, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a [`PairedTransform`] without randomness."""
        return self._arm(chosen), self._arm(rejected)

    def of_arms(self, arms: Iterable[Media], generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Likewise, of the arms of a sample."""
        return [self._arm(media) for media in arms]

    def _arm(self, media: Media) -> torch.Tensor:
        return PairedTransform(nearest_bucket(*picture_size(media), self.sizes)).centred(media)


class BucketSampler(torch.utils.data.Sampler):
    """An order of pairs in which every `batch_size` of them, counted from the first, are of one bucket.

    The order follows from (seed, epoch). The last batch of a bucket is filled up with others of its pairs, so that
    every pair comes at least once in every epoch.

    Args:
        buckets: (pairs,) integers.
        batch_size: pairs of a batch, on one process.
        seed: of the order.
        epoch: one integer that whoever owns the dataset changes.
    """

    def __init__(self, buckets: np.ndarray, batch_size: int, seed: int, epoch: torch.Tensor):
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = epoch
        order = np.argsort(buckets, kind="stable")
        self._members = np.split(order, np.flatnonzero(np.diff(buckets[order])) + 1)

    def __len__(self) -> int:
        return sum(-(-len(members) // self.batch_size) for members in self._members) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = seeded_generator(self.seed, int(self._epoch[0]))
        batches = []
        for members in self._members:
            shuffled = members[torch.randperm(len(members), generator=generator).numpy()]
            batches.append(np.resize(shuffled, (-(-len(members) // self.batch_size), self.batch_size)))
        joined = np.concatenate(batches)
        for batch in torch.randperm(len(joined), generator=generator).tolist():
            yield from joined[batch].tolist()
