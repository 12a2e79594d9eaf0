# SPDX-License-Identifier: Apache-2.0
"""ImageReward computes what the authors' network does, from a file of theirs."""

import pytest
import torch
from transformers import BlipTextConfig, BlipVisionConfig

from tests.rewards.blip_oracle import PublishedImageReward
from tests.rewards.tiny import PROMPTS, SIDE, bert_tokenizer, blip_configs, pictures, randomised
from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.image_reward import (
    TEXT,
    VISION,
    ImageReward,
    ImageRewardModel,
    from_published,
    load_image_reward,
)
from trl_sipo.rewards.pixels import cropped_pixels

ODD = (SIDE, SIDE + 3)  # where torchvision's crop is another than transformers'


@pytest.fixture
def published():
    """A tiny network of the authors' with random weights."""
    vision, text = (24, 2, 3, SIDE, 8), (16, 32, 2, 2, 40, 120, 24)
    return randomised(PublishedImageReward(vision, text), 5).eval()


@pytest.fixture
def reward(published, tmp_path):
    """Ours, from its file."""
    torch.save(published.state_dict(), tmp_path / "ImageReward.pt")
    model = load_image_reward(tmp_path / "ImageReward.pt", *blip_configs())
    return ImageReward(model, tokenizer=bert_tokenizer())


def test_it_is_the_published_network(published, reward):
    images, prompts = pictures(3, ODD), [*PROMPTS[:2], "a long prompt " * 20]
    tokens = bert_tokenizer()(prompts, padding="longest", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids.shape == (3, 35) and tokens.attention_mask[0].sum() < 35
    assert tokens.input_ids[:, 0].tolist() == [2, 2, 2]  # [CLS], and not [ENC]
    with torch.no_grad():
        expected = published(
            cropped_pixels(images, SIDE, rounding="torchvision"), tokens.input_ids, tokens.attention_mask
        )
    torch.testing.assert_close(reward.score(images, prompts), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.005


def test_image_and_prompt_both_matter_and_the_rest_of_the_batch_does_not(reward):
    one, other = pictures(2)
    scores = reward.score([one, other, one], [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    assert (scores[0] - scores[1]).abs() > 1e-4 and (scores[0] - scores[2]).abs() > 1e-4
    assert reward.score([one], PROMPTS[:1]).item() == pytest.approx(scores[0].item(), abs=1e-6)


def test_the_published_size_fits():
    with torch.device("meta"):
        vision, text = (1024, 24, 16, 224, 16), (768, 3072, 12, 12, 512, 30524, 1024)
        stored = PublishedImageReward(vision, text).state_dict()
        published = from_published(stored)
        ours = ImageRewardModel(BlipVisionConfig(**VISION), BlipTextConfig(**TEXT)).state_dict()
    assert {name: value.shape for name, value in published.items()} == {n: v.shape for n, v in ours.items()}
    in_file = sum(value.numel() * value.element_size() for value in stored.values())
    assert in_file == pytest.approx(1.79e9, abs=0.005e9)  # as the hub gives the size of ImageReward.pt


def test_the_configuration_is_that_of_the_published_code():
    """What shapes do not show."""
    vision, text = BlipVisionConfig(**VISION), BlipTextConfig(**TEXT)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    assert (vision.num_attention_heads, text.num_attention_heads) == (16, 12)
    assert vision.hidden_act == text.hidden_act == "gelu" and text.is_decoder


def test_other_weights_are_refused(published, tmp_path):
    weights = published.state_dict()
    for change, message in (
        ({"blip.visual_encoder.head.weight": torch.ones(3)}, "no weight of BLIP's vision transformer"),
        ({"mlp.layers.7.bias": torch.ones(3)}, "does not fit ImageRewardModel"),
    ):
        torch.save({**weights, **change}, tmp_path / "w.pt")
        with pytest.raises(ConfigurationError, match=message):
            load_image_reward(tmp_path / "w.pt", *blip_configs())
