# SPDX-License-Identifier: Apache-2.0
"""The shipped photographs, the way they are tinted, and the prompts that describe them."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from trl_sipo.demo import fashion, make_fashion_subset
from trl_sipo.errors import ConfigurationError, DatasetError


def content_hashes(split: str) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in fashion.load_split(split).images]


def test_splits_are_balanced_and_of_the_stated_sizes():
    for split, per_class in fashion.SPLITS.items():
        data = fashion.load_split(split)
        assert data.images.shape == (8 * per_class, 28, 28)
        assert data.images.dtype == torch.uint8
        assert data.class_ids.bincount().tolist() == [per_class] * 8


def test_no_photograph_is_in_two_splits_or_twice_in_one():
    hashes = [digest for split in fashion.SPLITS for digest in content_hashes(split)]
    assert len(hashes) == len(set(hashes)) == 11_400


def test_strips_keep_every_pixel_and_the_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    fashion.write_strip(images, tmp_path / "strip.png")
    assert np.array_equal(fashion.read_strip(tmp_path / "strip.png"), images)


def test_shipped_photographs_stay_small_and_carry_their_licence():
    folder = fashion.ASSETS / "fashion"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_500_000
    notice = (folder / "NOTICE").read_text()
    assert "Zalando" in notice
    assert "Permission is hereby granted, free of charge" in notice


def test_unknown_split_names_the_known_ones():
    with pytest.raises(ConfigurationError, match="generator, verifier"):
        fashion.load_split("train")


@pytest.mark.parametrize(
    ("class_id", "colour_id", "text"),
    [
        (7, 0, "a red ankle boot"),
        (7, 1, "an orange ankle boot"),
        (0, 6, "a pink t-shirt"),
        (1, 4, "blue trousers"),
        (1, 1, "orange trousers"),
        (3, 1, "an orange dress"),
    ],
)
def test_prompts_are_correct_english(class_id, colour_id, text):
    assert fashion.FashionPrompt(class_id, colour_id).text == text


def test_prompt_split_is_a_partition_that_covers_each_class_and_colour_evenly():
    train, held_out = fashion.split_prompts()
    assert set(train) | set(held_out) == set(fashion.all_prompts())
    assert not set(train) & set(held_out)
    assert len({prompt.text for prompt in fashion.all_prompts()}) == 64
    for attribute in ("class_id", "colour_id"):
        counts = np.bincount([getattr(prompt, attribute) for prompt in held_out], minlength=8)
        assert counts.tolist() == [2] * 8


def test_tint_gives_white_ground_and_the_colour_asked_for():
    images = torch.zeros(1, 28, 28, dtype=torch.uint8)
    images[0, 10:20, 10:20] = 255
    rgb = torch.tensor([[0.8, 0.2, 0.4]])
    pixels = fashion.tint(images, rgb)
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.equal(pixels[0, :, 0, 0], torch.ones(3))
    # Two pixels of margin on each side: the centre of the square is at 16 or 17.
    assert torch.allclose((pixels[0, :, 16, 16] + 1) / 2, rgb[0], atol=1e-6)


def test_colours_vary_with_the_generator_only_and_within_the_jitter():
    ids = torch.arange(8)
    plain = fashion.colour_values(ids, None)
    assert torch.equal((plain * 255).round().int(), torch.tensor(fashion.COLOUR_RGB, dtype=torch.int32))
    first, again = (fashion.colour_values(ids, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert 0 < (first - plain).abs().max() <= 0.06 + 1e-6


def test_turning_keeps_the_ground_white_and_shrinks():
    images = fashion.tint(fashion.load_split("generator").images[:200], torch.full((200, 3), 0.2))
    turned = fashion.turn(images, torch.Generator().manual_seed(0))
    assert turned.shape == images.shape
    assert turned.min() >= -1 - 1e-5 and turned.max() <= 1 + 1e-5
    assert torch.allclose(turned[:, :, 0, 0], torch.ones(200, 3), atol=1e-4)
    # The garment covers less of the picture, by the square of the mean scale of 0.8.
    coverage = [(1 - pixels).sum().item() for pixels in (turned, images)]
    assert coverage[0] / coverage[1] == pytest.approx(0.65, abs=0.06)
    assert torch.equal(turned, fashion.turn(images, torch.Generator().manual_seed(0)))


def test_turning_mirrors_some_photographs_and_not_others():
    # Left half black: after turning by at most 25 degrees it is the left or the right side that is dark.
    halves = torch.ones(200, 3, 32, 32)
    halves[:, :, 8:24, 8:16] = -1
    turned = fashion.turn(halves, torch.Generator().manual_seed(0))
    dark_left = turned[:, :, :, :16].sum((1, 2, 3)) < turned[:, :, :, 16:].sum((1, 2, 3))
    assert 0.35 < dark_left.float().mean() < 0.65


def write_idx(path, array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_subset_maker_draws_disjoint_splits_without_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(
        make_fashion_subset, "SPLITS", {"generator": 25, "verifier": 25, "second_verifier": 25, "test": 25}
    )
    rng = np.random.default_rng(0)
    for prefix, per_class in (("train", 90), ("t10k", 30)):
        labels = np.repeat(np.arange(10, dtype=np.uint8), per_class)
        images = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        # Ten copies of one photograph per class, as a careless source might hold.
        for label in range(10):
            images[np.flatnonzero(labels == label)[1:6]] = images[np.flatnonzero(labels == label)[0]]
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    make_fashion_subset.main([str(tmp_path), "--output", str(tmp_path / "strips")])
    strips = sorted((tmp_path / "strips").glob("*.png"))
    assert len(strips) == 4 * 8
    photographs = [image.tobytes() for strip in strips for image in fashion.read_strip(strip)]
    assert len(photographs) == len(set(photographs)) == 4 * 8 * 25


def test_subset_maker_refuses_missing_and_foreign_files(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        make_fashion_subset.main([str(tmp_path)])
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(DatasetError, match="not an idx file"):
        make_fashion_subset.read_idx(path)
