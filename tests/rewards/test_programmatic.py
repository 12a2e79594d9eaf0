# SPDX-License-Identifier: Apache-2.0
"""Rewards whose truth can be said by looking at the picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.registry import load_reward

BLACK, WHITE, RED, BLUE = (Image.new("RGB", (12, 8), name) for name in ("black", "white", "red", "blue"))
HALF = Image.new("RGB", (12, 8), "white")
HALF.paste("red", (0, 0, 6, 8))


def scores(name, media, prompts=None, **options):
    """What the reward of this name gives."""
    return load_reward(name, **options).score(media, prompts or ["a prompt"] * len(media)).tolist()


def video(*images):
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("name", ["brightness", "sharpness", "symmetry", "colour_share", "motion", "flicker"])
def test_they_are_rewards_that_say_what_they_depend_on(name):
    reward = load_reward(name)
    assert isinstance(reward, Reward) and reward.info.name == name
    assert reward.identity() == load_reward(name).identity()
    assert reward.score([], []).shape == (0,)
    assert reward.score([video(RED, BLUE, RED)], ["red"]).dtype == torch.float32


def test_brightness():
    assert scores("brightness", [BLACK, WHITE, RED, HALF]) == pytest.approx([0, 1, 0.299, 0.6495], abs=1e-6)
    assert scores("brightness", [video(BLACK, WHITE, WHITE), WHITE.convert("L")]) == pytest.approx([2 / 3, 1])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    assert scores("brightness", [noise]) == pytest.approx([np.asarray(noise.convert("L")).mean() / 255], abs=2e-3)


def test_sharpness():
    """Of one white pixel on black, 5x5: the Laplacian is -4 there, 1 at its four neighbours, 0 at four corners."""
    dot = Image.new("RGB", (5, 5))
    dot.putpixel((2, 2), (255, 255, 255))
    assert scores("sharpness", [WHITE, dot]) == pytest.approx([0, 255**2 * 20 / 9])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    blurred = noise.resize((10, 10)).resize((40, 40))
    sharp, soft = scores("sharpness", [noise, blurred])
    assert sharp > 10 * soft
    with pytest.raises(DatasetError, match="2x8 pixels have no inside"):
        scores("sharpness", [WHITE.crop((0, 0, 2, 8))])


def test_symmetry():
    assert scores("symmetry", [WHITE, HALF]) == pytest.approx([1, 1 - 2 / 3])  # of red and white, two channels differ
    assert scores("symmetry", [HALF.rotate(90, expand=True)]) == pytest.approx([1])


def test_motion():
    still, blinking = video(RED, RED, RED), video(BLACK, WHITE, WHITE)
    assert scores("motion", [still, blinking]) == pytest.approx([0, 1 / 2])
    with pytest.raises(DatasetError, match="medium 0 is one image, and it scores video"):
        scores("motion", [RED])
    with pytest.raises(DatasetError, match="one frame has no motion"):
        scores("motion", [video(RED)])


def test_flicker_is_change_back_and_forth():
    greys = lambda *levels: np.stack([np.full((4, 4, 3), level, dtype=np.uint8) for level in levels])  # noqa: E731
    fading, blinking, still = greys(0, 50, 100, 150), greys(0, 255, 0, 255), greys(9, 9, 9)
    assert scores("flicker", [fading, blinking, still]) == pytest.approx([0, 1, 0])
    assert not load_reward("flicker").info.higher_is_better
    with pytest.raises(DatasetError, match="2 frames has none between"):
        scores("flicker", [greys(0, 1)])


def test_colour_share():
    prompts = ["a red bag", "A Blue bag", "a bag that is red, not white"]
    assert scores("colour_share", [HALF, HALF, RED], prompts[:2] + ["a red white bag"]) == pytest.approx([0.5, 0, 1])
    assert scores("colour_share", [HALF, video(RED, BLUE, BLUE, BLUE)], colour="red") == pytest.approx([0.5, 0.25])
    with pytest.raises(DatasetError, match="'a bag' names none of"):
        scores("colour_share", [HALF], ["a bag"])
    with pytest.raises(ConfigurationError, match="colour='mauve' is none of"):
        load_reward("colour_share", colour="mauve")
    assert load_reward("colour_share", colour="red").identity() != load_reward("colour_share").identity()
