# SPDX-License-Identifier: Apache-2.0
"""What all rewards by a model share: batches, frames of videos, checks, and what they say of themselves."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.rewards.tiny import PROMPTS, clip, pictures
from trl_sipo.errors import ConfigurationError, DatasetError, RewardError
from trl_sipo.rewards.base import RewardInfo
from trl_sipo.rewards.batched import BatchedReward
from trl_sipo.rewards.clip_scores import CLIPScore, HPSv2, HPSv21, PickScore


class Brightness(BatchedReward):
    """The mean grey, times the length of the prompt; keeps the sizes of its batches."""

    def __init__(self, models=(), **options):
        super().__init__(RewardInfo("brightness", "mean grey x length", "MIT"), models=models, **options)
        self.batches: list[int] = []

    def score_images(self, images, prompts):
        assert all(image.mode == "RGB" for image in images) and not torch.is_grad_enabled()
        self.batches.append(len(images))
        greys = [np.asarray(image, dtype=np.float64).mean() * len(p) for image, p in zip(images, prompts, strict=True)]
        return torch.tensor(greys)


def _by_hand(image, prompt) -> float:
    return np.asarray(image).mean() * len(prompt)


def test_batches_are_of_their_size_and_in_order():
    images, prompts = pictures(7), [str(10**number) for number in range(7)]
    reward = Brightness(batch_size=3)
    scores = reward.score(images, prompts)
    assert reward.batches == [3, 3, 1]
    np.testing.assert_allclose(scores, [_by_hand(i, p) for i, p in zip(images, prompts, strict=True)], rtol=1e-6)
    assert reward.score([], []).shape == (0,)


def test_a_model_scores_the_same_in_any_batch_and_order():
    model, tokenizer = clip(seed=2)
    images, prompts = pictures(5), [*PROMPTS, "a", "many more words"]
    one_by_one = PickScore(model, tokenizer=tokenizer, batch_size=1).score(images, prompts)
    backwards = PickScore(model, tokenizer=tokenizer, batch_size=2).score(images[::-1], prompts[::-1]).flip(0)
    torch.testing.assert_close(one_by_one, backwards, rtol=1e-5, atol=1e-6)
    assert one_by_one.std() > 1e-3 and not one_by_one.requires_grad


def test_a_video_is_the_mean_of_its_frames():
    images = pictures(8)
    video = np.stack([np.asarray(image) for image in images])
    reward = Brightness(batch_size=2, frames_per_video=4)
    scores = reward.score([images[0], video, video[:3]], ["ab", "abc", "a"])
    assert reward.batches == [2, 2, 2, 2]
    of_video = np.mean([_by_hand(images[number], "abc") for number in (1, 3, 5, 7)])
    of_short = np.mean([_by_hand(image, "a") for image in images[:3]])
    np.testing.assert_allclose(scores, [_by_hand(images[0], "ab"), of_video, of_short], rtol=1e-6)
    assert reward.info.media == {"image", "video"} and "mean over 4 frames" in reward.info.convention


def test_videos_are_refused_unless_asked_for():
    video = np.zeros((3, 4, 4, 3), np.uint8)
    reward = Brightness()
    assert reward.info.media == {"image"}
    with pytest.raises(DatasetError, match="medium 1 is a video. Set `frames_per_video`"):
        reward.score([pictures(1)[0], video], ["a", "b"])


@pytest.mark.parametrize("option", ["batch_size", "frames_per_video"])
def test_numbers_below_one_are_refused(option):
    with pytest.raises(ConfigurationError, match=f"`{option}` of brightness must be at least 1, got 0"):
        Brightness(**{option: 0})


def test_scores_that_are_no_numbers_are_errors():
    model, tokenizer = clip()
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match="pickscore gave nan for the prompt 'a red sneaker'; 3 of 3 scores are"):
        PickScore(model, tokenizer=tokenizer).score(pictures(), PROMPTS)


def test_other_than_one_score_per_image_is_an_error():
    class Column(Brightness):
        def score_images(self, images, prompts):
            return super().score_images(images, prompts)[:, None]

    with pytest.raises(RewardError, match=r"brightness gave scores of shape \(3, 1\) for 3 samples, not \(3,\)"):
        Column().score(pictures(), PROMPTS)


def test_an_identity_is_all_that_a_score_depends_on():
    model, tokenizer = clip()
    changed = clip()[0]
    with torch.no_grad():
        changed.text_model.final_layer_norm.bias[0] += 1e-3
    other_words = clip()[1]
    other_words.add_tokens(["sneaker"])
    rewards = [
        PickScore(model, tokenizer=tokenizer),
        PickScore(model, tokenizer=tokenizer, bare_cosine=True),
        PickScore(model, tokenizer=tokenizer, frames_per_video=2),
        PickScore(model, tokenizer=other_words),
        PickScore(changed, tokenizer=tokenizer),
        PickScore(clip()[0], tokenizer=tokenizer, dtype="bfloat16"),
        CLIPScore(model=clip()[0], tokenizer=tokenizer),
        CLIPScore("torchmetrics", model=clip()[0], tokenizer=tokenizer),
        HPSv2(clip()[0], tokenizer=tokenizer),
        HPSv2(clip()[0], tokenizer=tokenizer, antialias=False),
        HPSv21(clip()[0], tokenizer=tokenizer),
    ]
    identities = [json.dumps(reward.identity(), sort_keys=True) for reward in rewards]
    assert len(set(identities)) == len(identities)
    again = PickScore(clip()[0], tokenizer=clip()[1], batch_size=1)
    assert json.dumps(again.identity(), sort_keys=True) == identities[0]


def test_an_identity_has_the_configuration_that_weights_do_not_show():
    one, two = (Brightness([nn.Linear(2, 2)]) for _ in range(2))
    two._models[0].load_state_dict(one._models[0].state_dict())
    assert one.identity() == two.identity()
    model, tokenizer = clip()
    before = PickScore(model, tokenizer=tokenizer).identity()
    model.config.text_config.hidden_act = "gelu"
    assert PickScore(model, tokenizer=tokenizer).identity() != before
