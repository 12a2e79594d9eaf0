# SPDX-License-Identifier: Apache-2.0
"""Sizes of all backbones, crops of all sizes, buckets and seeds."""

import functools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.adapters.backbone_cases import BACKBONES
from trl_sipo.adapters import adapter_for
from trl_sipo.data.cache.buckets import BucketSampler, bucket_sizes, nearest_bucket
from trl_sipo.data.frame_source import frames_of_array
from trl_sipo.data.seeding import mix_seed, seeded_generator
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.video import ClipSampler, checked_length, read_clip
from trl_sipo.errors import ConfigurationError, DatasetError

sides = st.integers(1, 300)
areas = st.integers(64, 1100)


@functools.cache
def adapter_of(case):
    return adapter_for(case.build())


@pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case.name)
@settings(max_examples=40)
@given(height=st.integers(-8, 4100), width=st.integers(-8, 4100), num_frames=st.integers(-3, 300))
def test_sizes(case, height, width, num_frames):
    """A size is taken, or refused with those that are: who follows them arrives, one error for each number or two."""
    adapter = adapter_of(case)
    size = {"height": height, "width": width, "num_frames": num_frames}
    for _ in range(2 * len(size)):
        try:
            shape = adapter.latent_shape(**size)
            break
        except ConfigurationError as error:
            name = str(error).split()[0]
            valid = re.findall(r"\d+", re.split("(?:Nearest|Largest) valid:|leave num_frames at", str(error))[1])
            size[name] = min(map(int, valid), key=lambda value: abs(value - size[name]))
    assert all(type(number) is int and number > 0 for number in shape)
    taken = [name for name, value in {"height": height, "width": width}.items() if size[name] == value]
    assert all(size[name] % adapter.spatial_multiple == 0 for name in taken)


def ramp(width, height):
    """A picture whose colours tell the place: red grows to the right, green downwards."""
    x = np.linspace(0, 255, width).astype(np.uint8)
    y = np.linspace(0, 255, height).astype(np.uint8)
    return Image.fromarray(np.dstack(np.broadcast_arrays(x[None], y[:, None], np.uint8(0))).astype(np.uint8))


@settings(max_examples=60)
@given(sides, sides, st.integers(1, 64), st.integers(1, 64), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_crops(width, height, to_height, to_width, center, flip, seed):
    """Any size becomes the one asked for; arms of equal size are cropped alike."""
    transform = PairedTransform((to_height, to_width), center_crop=center, random_flip=flip)
    picture = ramp(width, height)
    chosen, rejected = transform(picture, picture, seeded_generator(seed))
    assert chosen.shape == (3, to_height, to_width) and torch.equal(chosen, rejected)
    assert torch.isfinite(chosen).all() and chosen.abs().max() <= 1
    again, _ = transform(picture, picture, seeded_generator(seed))
    assert torch.equal(chosen, again)
    still = transform.for_evaluation()
    assert not still.is_random and torch.equal(still(picture, picture)[0], transform.centred(picture))


@given(
    st.integers(64, 1100),
    st.integers(64, 1100),
    st.sampled_from([8, 16, 32, 64]),
    st.integers(1, 4000),
    st.integers(1, 4000),
)
def test_buckets(height, width, multiple, of_height, of_width):
    size = (max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple)
    sizes = bucket_sizes(size, multiple)
    assert size in sizes and len(set(sizes)) == len(sizes)
    assert all(h % multiple == w % multiple == 0 and h > 0 and w > 0 for h, w in sizes)
    assert all(h * w <= size[0] * size[1] for h, w in sizes)
    nearest = nearest_bucket(of_height, of_width, sizes)
    distance = abs(math.log(nearest[1] / nearest[0]) - math.log(of_width / of_height))
    assert all(distance <= abs(math.log(w / h) - math.log(of_width / of_height)) + 1e-12 for h, w in sizes)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 99), st.integers(0, 9))
def test_an_order_of_buckets(buckets, batch_size, seed, epoch):
    """Every pair comes, and no batch mixes buckets."""
    buckets = np.array(buckets)
    sampler = BucketSampler(buckets, batch_size, seed, torch.tensor([epoch]))
    order = list(sampler)
    assert len(order) == len(sampler) and set(order) == set(range(len(buckets))) and order == list(sampler)
    for start in range(0, len(order), batch_size):
        assert len(set(buckets[order[start : start + batch_size]])) == 1


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4), st.integers(-(2**70), 2**70))
def test_seeds(integers, other):
    """In range, the same whenever asked, and of all integers in their order."""
    seed = mix_seed(*integers)
    assert 0 <= seed < 2**63 and seed == mix_seed(*integers)
    assert seed != mix_seed(*integers, other)
    assert integers[0] == other or seed != mix_seed(other, *integers[1:])
    assert torch.equal(
        torch.rand(2, generator=seeded_generator(*integers)), torch.rand(2, generator=seeded_generator(*integers))
    )


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.none() | st.floats(0.5, 60), st.integers(1, 60), st.integers(0, 30))
def test_clips(length, num_frames, frame_rate, own_rate, start):
    """A clip has its frames, in order and evenly taken, or is refused for being too short."""
    array = np.zeros((length, 4, 4, 3), np.uint8) + np.arange(length, dtype=np.uint8)[:, None, None, None]
    video = frames_of_array(array, Fraction(own_rate), "the video")
    sampler = ClipSampler(num_frames, frame_rate)
    try:
        room = checked_length(video, sampler) - num_frames
    except DatasetError as error:
        assert "too short" in str(error)
        return
    numbers = [image.getpixel((0, 0))[0] for image in read_clip(video, sampler, min(start, room))]
    assert len(numbers) == num_frames and numbers == sorted(numbers)
    if frame_rate is None:
        assert numbers == list(range(min(start, room), min(start, room) + num_frames))
