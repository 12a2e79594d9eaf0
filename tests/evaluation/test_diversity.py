# SPDX-License-Identifier: Apache-2.0
"""Variety and drift on sets of samples whose values are known."""

import numpy as np
import pytest
import torch
from PIL import Image

from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.diversity import compare_variety, pixel_features, within_prompt_distances

PROMPTS = ["a"] * 4 + ["b"] * 4


def base_features():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


def test_distances_are_within_a_prompt():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [9.0, 9.0]])
    assert within_prompt_distances(features, ["a", "a", "b", "c"]) == ([5.0], ["a"])


def test_the_base_beside_itself_has_spread_one_and_no_drift():
    variety = compare_variety(base_features(), base_features(), PROMPTS)
    assert variety.relative_spread.estimate == pytest.approx(1)
    assert (variety.drift.estimate, variety.drift.low) == (0, 0)


def test_one_picture_again_and_again_has_no_spread():
    collapsed = base_features()[[0, 0, 0, 0, 4, 4, 4, 4]]
    variety = compare_variety(base_features(), collapsed, PROMPTS)
    assert variety.relative_spread.estimate == 0 and variety.drift.estimate > 0.5


def test_other_seeds_drift_by_about_one():
    generator = torch.Generator().manual_seed(1)
    base, other = torch.randn(2, 400, 30, generator=generator)
    variety = compare_variety(base, other, [str(index // 4) for index in range(400)])
    assert variety.drift.estimate == pytest.approx(1, abs=0.03)
    assert variety.drift.low < variety.drift.estimate < variety.drift.high
    half = compare_variety(base, base / 2, [str(index // 4) for index in range(400)])
    assert half.relative_spread.estimate == pytest.approx(0.5)


def test_what_has_no_scale_is_refused():
    with pytest.raises(ConfigurationError, match="at least two"):
        compare_variety(base_features(), base_features(), [str(index) for index in range(8)])
    with pytest.raises(ConfigurationError, match="do not pair"):
        compare_variety(base_features(), base_features()[:4], PROMPTS)


def test_pixels_of_images_and_videos():
    red, half = Image.new("RGB", (40, 20), "red"), Image.new("L", (20, 20), 51)
    features = pixel_features([red, half])
    assert features.shape == (2, 768) and features[0].reshape(-1, 3).unique(dim=0).tolist() == [[1, 0, 0]]
    assert features[1].unique().tolist() == pytest.approx([0.2])
    video = np.zeros((9, 8, 8, 3), dtype=np.uint8)
    video[-1] = 255
    assert pixel_features([video]).reshape(4, -1).mean(1).tolist() == [0, 0, 0, 1]
