# SPDX-License-Identifier: Apache-2.0
"""open_clip's weights, as transformers' CLIP, compute what open_clip's network does."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from tests.rewards.open_clip_oracle import OpenCLIP
from tests.rewards.tiny import PROMPTS, SIDE, clip_config, pictures, randomised
from tests.tiny_models import tiny_clip_tokenizer
from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.clip_scores import HPSv2
from trl_sipo.rewards.open_clip import VIT_H_14, from_open_clip, load_open_clip
from trl_sipo.rewards.pixels import padded_pixels

TOKENS = 12


@pytest.fixture
def published():
    """A tiny network of open_clip's with random weights, and the tokenizer of its words."""
    tokenizer = tiny_clip_tokenizer(TOKENS)
    vision, text = (24, 2, 2, SIDE, 8), (16, 2, 2, TOKENS, len(tokenizer))
    network = OpenCLIP(12, vision, text)
    # The configuration's feed-forward widths are open_clip's, four times the width.
    config = clip_config(tokenizer, hidden_act="gelu")
    config.vision_config.intermediate_size, config.text_config.intermediate_size = 96, 64
    return randomised(network, 3).eval(), config, tokenizer


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "checkpoint", "half"])
def test_hpsv2_from_a_file_of_open_clip(published, kind, tmp_path):
    network, config, tokenizer = published
    if kind == "half":  # as they are published; scores are in float32 all the same
        network.half().float()
    weights = network.state_dict()
    if kind == "half":
        torch.save({name: value.half() for name, value in weights.items()}, file := tmp_path / "weights.pt")
    elif kind == "safetensors":
        save_file(weights, file := tmp_path / "weights.safetensors")
    else:
        stored = {"epoch": 3, "name": "run", "state_dict": weights} if kind == "checkpoint" else weights
        torch.save(stored, file := tmp_path / "weights.pt")
    reward = HPSv2(load_open_clip(file, config), tokenizer=tokenizer)

    images = pictures(3)
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    tokens = tokenizer([prompt.replace("&amp;", "&") for prompt in PROMPTS], **options).input_ids
    with torch.no_grad():
        image, text = network.visual(padded_pixels(images, SIDE)), network.text(tokens)
    expected = (image * text).sum(-1) / image.norm(dim=-1) / text.norm(dim=-1)
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.01


def test_the_published_size_fits():
    """Every weight of open_clip's ViT-H-14 has a place of its shape in the model that is made for it."""
    with torch.device("meta"):
        published = OpenCLIP(1024, (1280, 32, 16, 224, 14), (1024, 24, 16, 77, 49408)).state_dict()
        ours = CLIPModel(CLIPConfig(**VIT_H_14)).state_dict()
    converted = from_open_clip(published)
    assert {name: value.shape for name, value in converted.items()} == {n: v.shape for n, v in ours.items()}
    assert sum(value.numel() for value in ours.values()) == 986_109_441  # in half precision 1.97 GB, as the file


def test_the_configuration_is_open_clips():
    """What shapes do not show: heads are 80 wide in the vision transformer, and the GELU is exact."""
    config = CLIPConfig(**VIT_H_14)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size // vision.num_attention_heads, text.num_attention_heads) == (80, 16)
    assert vision.hidden_act == text.hidden_act == "gelu"
    assert vision.layer_norm_eps == text.layer_norm_eps == torch.nn.LayerNorm(1).eps
    assert (vision.image_size, text.max_position_embeddings, text.eos_token_id) == (224, 77, 49407)


def test_other_weights_are_refused(published, tmp_path):
    network, config, _ = published
    weights = network.state_dict()
    for change, message in (
        ({"visual.trunk.norm.weight": torch.ones(3)}, "no weight of an open_clip model"),
        ({"transformer.resblocks.0.ls_1.gamma": torch.ones(3)}, "no weight of an open_clip model"),
        ({"ln_final.weight": torch.ones(3)}, "does not fit CLIPModel"),
    ):
        save_file({**weights, **change}, tmp_path / "w.safetensors")
        with pytest.raises(ConfigurationError, match=message):
            load_open_clip(tmp_path / "w.safetensors", config)
    del weights["visual.proj"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ConfigurationError, match="visual_projection.weight"):
        load_open_clip(tmp_path / "w.safetensors", config)
