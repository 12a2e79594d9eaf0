# SPDX-License-Identifier: Apache-2.0
"""Shortcuts: planted ones are found, chance is not taken for one; and the properties they are made of."""

import io

import numpy as np
import pytest
from PIL import Image

from trl_sipo.data.checking.features import FEATURES, arm_features
from trl_sipo.evaluation.shortcuts import find_shortcuts

NAMES = ("first", "second", "third")


def _noise(seed, count=200):
    return np.random.default_rng(seed).normal(size=(2, count, len(NAMES)))


def test_a_planted_shortcut_is_the_strongest():
    chosen, rejected = _noise(0)
    chosen[:, 1] += 3
    found = find_shortcuts(NAMES, chosen, rejected, list(range(200)))
    assert found[0].name == "second" and found[0].is_more and found[0].strength > 0.4
    assert found[0].wins == int((chosen[:, 1] > rejected[:, 1]).sum()) and found[0].num_differing == 200
    assert found[0].area.estimate == pytest.approx(found[0].wins / 200)
    mirrored = find_shortcuts(NAMES, rejected, chosen, list(range(200)))[0]
    assert not mirrored.is_more and mirrored.strength == pytest.approx(found[0].strength, abs=0.02)


def test_chance_is_hardly_ever_taken_for_one():
    """All three intervals hold in 95 % of the trials; in 60 trials 3 may fail, and 10 hardly can."""
    failed = sum(
        any(shortcut.strength > 0 for shortcut in find_shortcuts(NAMES, *_noise(seed, 60), list(range(60))))
        for seed in range(1, 61)
    )
    assert failed <= 9


def test_pairs_of_one_prompt_are_one_trial():
    """A lucky prompt with many pairs is no proof."""
    chosen, rejected = np.ones((100, 1)), np.zeros((100, 1))
    chosen[90:], rejected[90:] = 0, 1
    (apart,) = find_shortcuts(("x",), chosen, rejected, list(range(100)))
    (together,) = find_shortcuts(("x",), chosen, rejected, [0] * 90 + list(range(10)))
    assert apart.strength > 0.2 and together.strength == 0


def test_missing_and_equal_values():
    chosen, rejected = np.array([[1.0, np.nan, 2.0], [1.0, 5.0, 3.0]]), np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 3.0]])
    found = {shortcut.name: shortcut for shortcut in find_shortcuts(NAMES, chosen, rejected, ["a", "b"])}
    assert set(found) == {"second", "third"}  # nothing differs in the first
    assert found["second"].num_pairs == 1 and found["third"].area.estimate == 0.75


def _features(image, value):
    return dict(zip(FEATURES, arm_features(value, image), strict=True))


def _file(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_properties_of_a_picture():
    flat = Image.new("RGB", (40, 20), (255, 0, 0))
    found = _features(flat, _file(flat, "PNG"))
    assert found["pixels"] == 800 and found["aspect"] == 2 and found["is_lossy"] == 0
    assert found["brightness"] == pytest.approx(0.299, abs=1e-3) and found["colourfulness"] == 1
    assert found["contrast"] == pytest.approx(0, abs=1e-6) and found["sharpness"] == pytest.approx(0, abs=1e-5)
    assert np.isnan(found["num_frames"]) and found["file_bytes"] == len(_file(flat, "PNG"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    blurred = noise.resize((10, 5)).resize((40, 20))
    assert _features(noise, None)["sharpness"] > 2 * _features(blurred, None)["sharpness"]
    assert np.isnan(_features(noise, None)["file_bytes"]) and np.isnan(_features(noise, None)["is_lossy"])


@pytest.mark.parametrize(
    ("kind", "options", "is_lossy"),
    [("JPEG", {}, 1), ("WEBP", {}, 1), ("WEBP", {"lossless": True}, 0), ("PNG", {}, 0), ("BMP", {}, 0)],
)
def test_lossy_formats_are_told_by_their_bytes(kind, options, is_lossy, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    data = _file(image, kind, **options)
    (tmp_path / "picture").write_bytes(data)
    for value in (data, str(tmp_path / "picture"), {"bytes": data, "path": None}):
        found = _features(image, value)
        assert found["is_lossy"] == is_lossy and found["bytes_per_pixel"] == pytest.approx(len(data) / 800)
