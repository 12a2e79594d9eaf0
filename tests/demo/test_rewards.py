# SPDX-License-Identifier: Apache-2.0
"""The demo's judges as rewards: the scores are the judges' own, and real photographs get good ones."""

import numpy as np
import pytest
import torch
from PIL import Image

from trl_sipo.demo.fashion import COLOURS, FashionPrompt, colour_values, load_split, tint
from trl_sipo.demo.sampling import prompt_ids
from trl_sipo.demo.verifier import load_verifiers
from trl_sipo.demo.video.model import VIDEO_ASSETS
from trl_sipo.demo.video.sprites import VideoPrompt, moving_photographs, random_clips
from trl_sipo.demo.video.verifier import judge_clips
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.generation.prompt_sets import load_prompts
from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.registry import load_reward

NAMES = ["fashion", "fashion-second", "fashion-correct", "fashion-second-correct"]


def as_bytes(pixels):
    """Pixels in [-1, 1] as uint8."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def photographs():
    """Tinted photographs that no judge learned from, and their prompts."""
    split, generator = load_split("test"), torch.Generator().manual_seed(0)
    chosen = torch.randint(len(split), (200,), generator=generator)
    colours = torch.randint(len(COLOURS), (200,), generator=generator)
    pixels = tint(split.images[chosen], colour_values(colours, generator))
    prompts = [FashionPrompt(*ids) for ids in zip(split.class_ids[chosen].tolist(), colours.tolist(), strict=True)]
    return [Image.fromarray(picture) for picture in as_bytes(pixels).transpose(0, 2, 3, 1)], prompts


def test_scores_of_pictures_are_those_of_the_judges(photographs):
    images, prompts = photographs
    texts = [prompt.text for prompt in prompts]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 127.5 - 1
    for names, judge in zip((NAMES[::2], NAMES[1::2]), load_verifiers(), strict=True):
        judged = judge.scores(pixels, *prompt_ids(prompts))
        log_probs, correct = (load_reward(name, batch_size=64).score(images, texts) for name in names)
        torch.testing.assert_close(log_probs, judged["log_prob"], rtol=1e-4, atol=1e-4)
        assert torch.equal(correct, judged["both_correct"].float())
        assert correct.mean() > 0.85 and log_probs.max() <= 0
        wrong = load_reward(names[1]).score(images, texts[1:] + texts[:1])
        assert wrong.mean() < 0.2


@pytest.mark.parametrize("name", [*NAMES, *(f"moving-{name}" for name in NAMES)])
def test_they_are_told_apart(name):
    reward = load_reward(name)
    assert isinstance(reward, Reward) and reward.info.name == name
    assert ("second" in reward.info.convention) == ("second" in name)
    assert ("1 if" in reward.info.convention) == ("correct" in name)
    assert reward.identity() == load_reward(name).identity()
    assert reward.info.media == {"video" if name.startswith("moving") else "image"}


def test_no_two_have_one_identity():
    identities = [load_reward(name).identity() for name in [*NAMES, *(f"moving-{name}" for name in NAMES)]]
    assert all(one not in identities[:number] for number, one in enumerate(identities))


def test_scores_of_clips_are_those_of_the_judges():
    clips, ids = random_clips(moving_photographs("test"), 24, torch.Generator().manual_seed(0))
    prompts = [VideoPrompt(FashionPrompt(*row[:2]), row[2]).text for row in ids.tolist()]
    videos = list(as_bytes(clips).transpose(0, 2, 3, 4, 1))
    rounded = torch.from_numpy(as_bytes(clips)) / 127.5 - 1
    for name, judge in zip(
        ("moving-fashion", "moving-fashion-second"), load_verifiers(VIDEO_ASSETS / "verifier"), strict=True
    ):
        judged = judge_clips(judge, rounded, ids)
        torch.testing.assert_close(load_reward(name).score(videos, prompts), judged["log_prob"], rtol=1e-4, atol=1e-4)
        correct = load_reward(f"{name}-correct").score(videos, prompts)
        assert torch.equal(correct, judged["correct"].float()) and correct.mean() > 0.7


def test_they_know_all_prompts_of_the_sets():
    records = load_prompts("fashion")
    images = [Image.new("RGB", (32, 32), "white")] * len(records)
    assert load_reward("fashion").score(images, [record.prompt for record in records]).isfinite().all()
    clip = np.full((5, 32, 32, 3), 255, dtype=np.uint8)
    records = load_prompts("moving-fashion")
    scores = load_reward("moving-fashion-correct").score([clip] * len(records), [record.prompt for record in records])
    assert scores.tolist() == [0] * len(records)  # nothing moves in an empty clip


@pytest.mark.parametrize(
    ("name", "medium", "prompt", "message"),
    [
        ("fashion", Image.new("RGB", (32, 32)), "a mauve sneaker", "'a mauve sneaker' is no prompt"),
        ("fashion", Image.new("RGB", (64, 32)), "a red sneaker", "32x32 pixels; this one has 64x32"),
        ("fashion", np.zeros((5, 32, 32, 3), dtype=np.uint8), "a red sneaker", "video"),
        ("moving-fashion", Image.new("RGB", (32, 32)), "a red sneaker moving left", "scores video"),
        ("moving-fashion", np.zeros((1, 32, 32, 3), dtype=np.uint8), "a red sneaker moving left", "nothing moves"),
        ("moving-fashion", np.zeros((5, 32, 48, 3), dtype=np.uint8), "a red sneaker moving left", "has 48x32"),
        ("moving-fashion", np.zeros((5, 32, 32, 3), dtype=np.uint8), "a red sneaker", "is no prompt"),
    ],
)
def test_what_they_cannot_judge(name, medium, prompt, message):
    with pytest.raises(DatasetError, match=message):
        load_reward(name).score([medium], [prompt])


def test_other_judges_and_measures_are_refused():
    for options in ({"judge": "third"}, {"measure": "beauty"}):
        with pytest.raises(ConfigurationError, match="the judges are primary, second, the measures log_prob, correct"):
            load_reward("fashion", **options)
