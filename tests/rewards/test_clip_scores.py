# SPDX-License-Identifier: Apache-2.0
"""CLIPScore, PickScore and HPSv2 against their formulas, computed from the models' parts in numpy."""

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.rewards.tiny import PROMPTS, SIDE, clip, pictures
from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.clip_scores import CLIPScore, HPSv2, HPSv21, PickScore
from trl_sipo.rewards.pixels import padded_pixels
from trl_sipo.rewards.registry import load_reward

PLAIN = [*PROMPTS[:2], "a cat & a dog"]
# Rows of 19 pixels, three too many: torchvision's crop begins a pixel later than transformers'.
IMAGES = pictures(3, (16, 19))


def _pixels(images, start: int) -> torch.Tensor:
    """The crop from column `start`, without any scaling, by CLIP's mean and deviation."""
    values = np.stack([np.asarray(image)[:, start : start + SIDE] for image in images]) / 255
    values = (values - CLIPImageProcessorPil.image_mean) / CLIPImageProcessorPil.image_std
    return torch.from_numpy(values).permute(0, 3, 1, 2).float()


def _cosines(model, tokenizer, pixels, prompts) -> np.ndarray:
    """One by one, from the towers and the projections, in float64."""
    cosines = []
    for image, prompt in zip(pixels, prompts, strict=True):
        ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        with torch.no_grad():
            seen = model.vision_model(image[None]).last_hidden_state[:, 0]
            seen = model.vision_model.post_layernorm(seen).numpy()[0] @ model.visual_projection.weight.numpy().T
            read = model.text_model(ids).last_hidden_state[0, -1]  # the end of the text
            read = read.numpy() @ model.text_projection.weight.numpy().T
        seen, read = seen.astype(np.float64), read.astype(np.float64)
        cosines.append(seen @ read / np.sqrt((seen @ seen) * (read @ read)))
    return np.array(cosines)


def test_clipscore_of_hessel():
    model, tokenizer = clip(2, max_length=40)
    reward = CLIPScore(model=model, tokenizer=tokenizer)
    cosines = _cosines(model, tokenizer, _pixels(IMAGES, 2), [f"A photo depicts {prompt}" for prompt in PLAIN])
    scores = reward.score(IMAGES, PROMPTS)
    assert cosines.min() > 0.05
    assert scores.dtype == torch.float32 and scores.shape == (3,) and scores.device.type == "cpu"
    np.testing.assert_allclose(scores, 2.5 * np.maximum(cosines, 0), atol=1e-5)
    assert "2.5 max(cos(image, 'A photo depicts ' + prompt), 0)" in reward.info.convention


def test_clipscore_of_torchmetrics():
    model, tokenizer = clip(2, max_length=40)
    reward = load_reward("clipscore", convention="torchmetrics", model=model, tokenizer=tokenizer)
    cosines = _cosines(model, tokenizer, _pixels(IMAGES, 1), PROMPTS)
    np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), 100 * np.maximum(cosines, 0), atol=1e-3)
    assert reward.info.convention == "100 max(cos(image, prompt), 0), torchmetrics"


@pytest.mark.parametrize(("convention", "scale", "start"), [("hessel", 2.5, 2), ("torchmetrics", 100, 1)])
def test_clipscore_clips_each_score(convention, scale, start):
    model, tokenizer = clip(48, max_length=40)
    reward = CLIPScore(convention, model=model, tokenizer=tokenizer, prompt_prefix="")
    cosines = _cosines(model, tokenizer, _pixels(IMAGES, start), PLAIN if convention == "hessel" else PROMPTS)
    assert cosines.min() < -0.01 and cosines.max() > 0.01
    np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), scale * np.maximum(cosines, 0), atol=1e-5 * scale)


def test_clipscore_with_another_prefix():
    model, tokenizer = clip(2, max_length=40)
    reward = CLIPScore(model=model, tokenizer=tokenizer, prompt_prefix="x ")
    cosines = _cosines(model, tokenizer, _pixels(IMAGES, 2), [f"x {prompt}" for prompt in PLAIN])
    np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), 2.5 * np.maximum(cosines, 0), atol=1e-5)
    with pytest.raises(ConfigurationError, match="one of hessel, torchmetrics, got 'percent'"):
        CLIPScore("percent", model=model, tokenizer=tokenizer)


def test_pickscore_with_its_scale_and_without():
    model, tokenizer = clip(seed=1)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    cosines = _cosines(model, tokenizer, _pixels(IMAGES, 1), PROMPTS)
    scaled = PickScore(model, tokenizer=tokenizer)
    bare = PickScore(model, tokenizer=tokenizer, bare_cosine=True)
    np.testing.assert_allclose(scaled.score(IMAGES, PROMPTS), np.exp(4.6) * cosines, atol=1e-3)
    np.testing.assert_allclose(bare.score(IMAGES, PROMPTS), cosines, atol=1e-5)
    assert (scaled.info.convention, bare.info.convention) == (
        "exp(logit_scale) cos(image, prompt)",
        "cos(image, prompt)",
    )


def test_hpsv2_is_the_cosine_of_the_padded_image():
    model, tokenizer = clip(seed=2)
    for reward_class, name in ((HPSv2, "hpsv2"), (HPSv21, "hpsv2.1")):
        for antialias in (True, False):
            reward = reward_class(model, tokenizer=tokenizer, antialias=antialias)
            cosines = _cosines(model, tokenizer, padded_pixels(IMAGES, SIDE, antialias=antialias), PLAIN)
            np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), cosines, atol=1e-5)
        assert reward.info.name == name


@pytest.mark.parametrize("reward_class", [CLIPScore, PickScore, HPSv2])
def test_long_prompts_are_cut_off(reward_class):
    model, tokenizer = clip()  # 16 tokens
    reward = reward_class(model=model, tokenizer=tokenizer)
    one, two, other = reward.score([IMAGES[0]] * 3, ["a" * 30, "a" * 200, "b" * 200]).tolist()
    assert one == pytest.approx(two, abs=1e-6)
    assert isinstance(reward, Reward)
    if reward_class is not CLIPScore:  # whose prefix alone fills them
        assert abs(one - other) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16], ids=str)
def test_half_precision_is_close(dtype):
    model, tokenizer = clip(seed=1)
    full = PickScore(model, tokenizer=tokenizer, bare_cosine=True).score(IMAGES, PROMPTS)
    half = PickScore(clip(seed=1)[0], tokenizer=tokenizer, bare_cosine=True, dtype=dtype).score(IMAGES, PROMPTS)
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.03
    with pytest.raises(ConfigurationError, match="`dtype` must be one of float32, bfloat16, float16, got 'int8'"):
        PickScore(model, tokenizer=tokenizer, dtype="int8")


def test_a_model_needs_its_tokenizer():
    with pytest.raises(ConfigurationError, match="needs `tokenizer` too"):
        PickScore(clip()[0])
