# SPDX-License-Identifier: Apache-2.0
"""Buckets: which sizes there are, which one an image goes to, and batches that do not mix them."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from trl_sipo.data.cache.buckets import BucketSampler, BucketTransform, bucket_sizes, nearest_bucket
from trl_sipo.data.images import image_size, open_image
from trl_sipo.data.transforms import PairedTransform


def test_the_sizes_of_the_docstring():
    sizes = bucket_sizes((512, 512), 64)
    assert set(sizes) == {(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)}


@pytest.mark.parametrize(
    ("size", "multiple"), [((1024, 1024), 64), ((1024, 1024), 16), ((480, 832), 32), ((32, 32), 8)]
)
def test_sizes_keep_to_the_budget_the_multiple_and_the_ratio(size, multiple):
    sizes = bucket_sizes(size, multiple)
    assert size in sizes and len(set(sizes)) == len(sizes) > 2
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        # One more step to either side would be beyond the budget.
        assert height * width <= size[0] * size[1] < (max(height, width) + multiple) * (min(height, width) + multiple)
        assert max(height / width, width / height) <= 2
        assert (width, height) in sizes or (height, width) == size


def test_an_image_goes_to_the_nearest_ratio():
    sizes = bucket_sizes((512, 512), 64)
    assert nearest_bucket(1000, 1000, sizes) == (512, 512)
    assert nearest_bucket(300, 400, sizes) == (448, 576)
    assert nearest_bucket(1, 50, sizes) == (384, 640) and nearest_bucket(50, 1, sizes) == (640, 384)
    for ratio in np.geomspace(0.3, 3, 50):
        found = nearest_bucket(1000, round(1000 * ratio), sizes)
        gap = abs(math.log(found[1] / found[0] / ratio))
        assert all(gap <= abs(math.log(width / height / ratio)) + 1e-3 for height, width in sizes)


def test_each_arm_takes_its_own_size():
    sizes = bucket_sizes((32, 32), 8)
    wide, high = (Image.effect_noise(size, 50).convert("RGB") for size in ((80, 48), (48, 80)))
    chosen, rejected = BucketTransform(sizes)(wide, high)
    assert chosen.shape == (3, 24, 40) and rejected.shape == (3, 40, 24)
    assert torch.equal(chosen, PairedTransform((24, 40))(wide, wide)[0])
    clip, _ = BucketTransform(sizes)([wide, wide, wide], [high])
    assert clip.shape == (3, 3, 24, 40) and torch.equal(clip[:, 2], chosen)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 9])
def test_the_size_in_a_header_is_that_of_the_opened_image(orientation, tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "image.jpg", exif=exif)
    opened = open_image(tmp_path / "image.jpg")
    assert image_size(tmp_path / "image.jpg") == (opened.height, opened.width)
    assert image_size(image) == (20, 30) or orientation in (6, 8)


def _sampler(buckets, batch_size=4, seed=0, epoch=0):
    return BucketSampler(np.array(buckets, dtype=np.int32), batch_size, seed, torch.tensor([epoch]))


def test_no_batch_mixes_buckets_and_every_pair_comes():
    buckets = [0] * 9 + [3] * 2 + [1] * 8 + [0] * 2
    sampler = _sampler(buckets)
    order = list(sampler)
    assert len(order) == len(sampler) == 4 * (3 + 1 + 2)
    for start in range(0, len(order), 4):
        assert len({buckets[index] for index in order[start : start + 4]}) == 1
    counts = Counter(order)
    assert set(counts) == set(range(21))
    assert all(counts[index] == 1 for index in range(11, 19)), "a bucket that fills its batches has no pair twice"


def test_the_order_depends_on_seed_and_epoch_alone():
    buckets = [0, 1] * 20
    assert list(_sampler(buckets)) == list(_sampler(buckets))
    assert list(_sampler(buckets)) != list(_sampler(buckets, epoch=1)) != list(_sampler(buckets, seed=1, epoch=1))
    kinds = [buckets[index] for index in list(_sampler(buckets))[::4]]
    assert kinds != sorted(kinds), "batches of the buckets come in turns"


def test_the_epoch_reaches_a_sampler_that_exists():
    epoch = torch.tensor([0])
    sampler = BucketSampler(np.zeros(20, dtype=np.int32), 4, 0, epoch)
    first = list(sampler)
    epoch[0] = 1
    assert list(sampler) != first
