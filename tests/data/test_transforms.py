# SPDX-License-Identifier: Apache-2.0
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.pictures import picture
from trl_sipo.data.seeding import seeded_generator
from trl_sipo.data.transforms import PairedTransform, image_to_tensor
from trl_sipo.errors import ConfigurationError


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Independent of the code under test."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


@pytest.mark.parametrize(("width", "height", "box"), [(64, 48, (4, 0, 28, 24)), (48, 96, (0, 12, 24, 36))])
def test_is_resize_then_centre_crop(width, height, box):
    # Soft contrast: Pillow resizes in two passes of 8 bits whose order depends on the shape, and overshoot clipped in
    # the first of them would show.
    image = picture(0, width, height).point(lambda value: 64 + value // 2)
    scale = min(width, height) // 24
    expected = image.resize((width // scale, height // scale), Image.Resampling.LANCZOS).crop(box)
    chosen, rejected = PairedTransform(24)(image, image)
    torch.testing.assert_close(chosen, to_tensor(expected), rtol=0, atol=1.01 / 127.5)
    assert torch.equal(chosen, rejected)


def test_own_size_is_left_alone():
    chosen, _ = PairedTransform(32)(picture(0, 32, 32), picture(1, 32, 32))
    torch.testing.assert_close(chosen, to_tensor(picture(0, 32, 32)), rtol=0, atol=1e-6)


def test_shapes_range_and_contiguity():
    chosen, rejected = PairedTransform(20)(Image.new("RGB", (7, 90), "white"), Image.new("RGB", (90, 7), "black"))
    assert chosen.shape == rejected.shape == (3, 20, 20)
    assert chosen.dtype == torch.float32
    assert chosen.is_contiguous()
    assert (chosen == 1).all()
    assert (rejected == -1).all()


def test_random_crop_and_flip_are_the_same_for_both_arms():
    transform = PairedTransform(16, center_crop=False, random_flip=True)
    image = picture(0, 60, 25)
    results = []
    for seed in range(40):
        chosen, rejected = transform(image, image.copy(), seeded_generator(seed))
        assert torch.equal(chosen, rejected)
        results.append(chosen)
    assert len({result.numpy().tobytes() for result in results}) == 40


def test_unequal_sizes_are_cropped_at_the_same_relative_place():
    # Colours grow along the longer side, so that a pixel tells where in the picture it comes from.
    small, large = (
        Image.fromarray(
            np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3)).astype(np.uint8)
        )
        for width, height in ((90, 30), (270, 90))
    )
    transform = PairedTransform(24, center_crop=False)
    means = []
    for seed in range(20):
        chosen, rejected = transform(small, large, seeded_generator(seed))
        assert (chosen - rejected).abs().max() < 0.03
        means.append(chosen.mean().item())
    assert min(means) < -0.4 and max(means) > 0.4  # the place does move over the picture


def test_crops_reach_both_ends():
    image = Image.new("RGB", (200, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    transform = PairedTransform(20, center_crop=False)
    means = [transform(image, image, seeded_generator(seed))[0].mean().item() for seed in range(200)]
    whole = sum(mean > 0.5 for mean in means)
    assert 1 <= whole <= 20  # 200 * (5 / 180) = 5.6 crops start within the first 5 of 180 places
    assert sum(mean == -1 for mean in means) > 150


def test_flips_half_of_the_time_and_is_a_mirror():
    image = picture(0, 16, 16)
    plain = to_tensor(image)
    transform = PairedTransform(16, random_flip=True)
    flipped = 0
    for seed in range(200):
        chosen, _ = transform(image, image, seeded_generator(seed))
        is_flipped = torch.allclose(chosen, plain.flip(-1))
        assert is_flipped or torch.allclose(chosen, plain)
        flipped += is_flipped
    assert 70 <= flipped <= 130


def test_the_flip_does_not_depend_on_the_crop():
    # Brightness grows from left to right over the picture, so a crop tells its place and whether it is mirrored.
    ramp = np.broadcast_to(np.linspace(0, 255, 90)[None, :, None], (20, 90, 3)).astype(np.uint8)
    image = Image.fromarray(ramp)
    transform = PairedTransform(20, center_crop=False, random_flip=True)
    found = set()
    for seed in range(60):
        chosen, _ = transform(image, image, seeded_generator(seed))
        found.add((bool(chosen.mean() > 0), bool(chosen[0, 0, 0] > chosen[0, 0, -1])))
    assert len(found) == 4


def test_turning_the_flip_on_does_not_move_the_crop():
    image = picture(0, 60, 20)
    for seed in range(10):
        plain, _ = PairedTransform(20, center_crop=False)(image, image, seeded_generator(seed))
        either, _ = PairedTransform(20, center_crop=False, random_flip=True)(image, image, seeded_generator(seed))
        assert torch.equal(either, plain) or torch.allclose(either.flip(-1), plain, atol=0.02)


def test_evaluation_has_no_randomness():
    transform = PairedTransform(16, center_crop=False, random_flip=True)
    assert transform.is_random
    evaluation = transform.for_evaluation()
    assert evaluation == PairedTransform(16) and not evaluation.is_random
    image = picture(0, 60, 25)
    assert torch.equal(evaluation(image, image)[0], evaluation(image, image, seeded_generator(3))[0])


def test_long_and_narrow_image_takes_no_memory():
    # Resized as a whole, this one would be 512 x 10,240,000 pixels.
    start = time.perf_counter()
    chosen, _ = PairedTransform(512)(Image.new("RGB", (20_000, 1), "white"), Image.new("RGB", (1, 20_000), "white"))
    assert chosen.shape == (3, 512, 512)
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("resolution", [0, -8, 16.0, "16", True, None])
def test_resolution_is_a_positive_integer(resolution):
    with pytest.raises(ConfigurationError, match="resolution must be a positive"):
        PairedTransform(resolution)


@pytest.mark.parametrize("options", [{"center_crop": False}, {"random_flip": True}])
def test_randomness_needs_a_generator(options):
    with pytest.raises(ConfigurationError, match="needs a torch.Generator"):
        PairedTransform(16, **options)(picture(0), picture(0))


def test_image_to_tensor_covers_the_range():
    image = Image.fromarray(np.array([[[0, 127, 255]]], dtype=np.uint8))
    torch.testing.assert_close(image_to_tensor(image).flatten(), torch.tensor([-1.0, 127 / 127.5 - 1, 1.0]))


@pytest.mark.parametrize("size", [(16, 28), (28, 16), [16, 28]])
@pytest.mark.parametrize(("width", "height"), [(60, 25), (25, 60), (112, 64), (28, 16)])
def test_height_and_width_are_covered_and_the_rest_is_cropped(size, width, height):
    image = picture(0, width, height).point(lambda value: 64 + value // 2)
    tall, wide = size
    scale = max(wide / width, tall / height)
    box_width, box_height = wide / scale, tall / scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    assert 0 <= left < 1e-9 or 0 <= top < 1e-9  # one side fits exactly
    expected = image.resize(
        (wide, tall), Image.Resampling.LANCZOS, box=(left, top, left + box_width, top + box_height)
    )
    chosen, _ = PairedTransform(size)(image, image)
    assert chosen.shape == (3, tall, wide)
    torch.testing.assert_close(chosen, to_tensor(expected), rtol=0, atol=1.01 / 127.5)


def test_height_and_width_of_a_square_are_its_side():
    image = picture(0, 60, 25)
    for seed in range(5):
        square, _ = PairedTransform(16, center_crop=False, random_flip=True)(image, image, seeded_generator(seed))
        pair, _ = PairedTransform((16, 16), center_crop=False, random_flip=True)(image, image, seeded_generator(seed))
        assert torch.equal(square, pair)


@pytest.mark.parametrize("resolution", [16, (16, 24)])
def test_all_frames_of_both_arms_have_one_crop_and_one_flip(resolution):
    transform = PairedTransform(resolution, center_crop=False, random_flip=True)
    image, frames = picture(0, 60, 25), 5
    for seed in range(10):
        alone, _ = transform(image, image, seeded_generator(seed))
        chosen, rejected = transform([image] * frames, [image.copy()] * frames, seeded_generator(seed))
        assert chosen.shape == (3, frames, *transform.size) and chosen.dtype == torch.float32
        assert torch.equal(chosen, rejected) and torch.equal(chosen, alone[:, None].expand_as(chosen))


def test_frames_stay_in_order():
    frames = [picture(seed, 16, 16) for seed in range(4)]
    chosen, rejected = PairedTransform(16)(frames, frames[::-1])
    for number, frame in enumerate(frames):
        torch.testing.assert_close(chosen[:, number], to_tensor(frame), rtol=0, atol=1e-6)
    assert torch.equal(rejected, chosen.flip(1))


@pytest.mark.parametrize("resolution", [(16,), (16, 16, 16), (16, 0), (16, 8.0), [], ("16", 16)])
def test_resolution_has_two_sides(resolution):
    with pytest.raises(ConfigurationError, match="resolution must be a positive number of pixels, or a pair"):
        PairedTransform(resolution)
