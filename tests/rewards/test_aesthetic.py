# SPDX-License-Identifier: Apache-2.0
"""LAION's aesthetic predictor against its formula, from weights as they are published."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModelWithProjection

from tests.rewards.tiny import PROMPTS, SIDE, clip, pictures
from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.aesthetic import AestheticScore
from trl_sipo.rewards.pixels import cropped_pixels

# The published names: dropouts lie between, and have no weights.
SIZES = {0: (12, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


@pytest.fixture(scope="module")
def head():
    """Weights of the head, by their published names."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, (size, following) in SIZES.items():
        weights[f"layers.{number}.weight"] = torch.randn(following, size, generator=generator) / size**0.5
        weights[f"layers.{number}.bias"] = torch.randn(following, generator=generator)
    return weights


@pytest.mark.parametrize("kind", ["safetensors", "pth", "folder"])
def test_by_hand(head, kind, tmp_path):
    if kind == "pth":
        torch.save(head, file := tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    else:
        save_file(head, file := tmp_path / "model.safetensors")
    model = clip()[0]
    model.save_pretrained(tmp_path / "clip")
    reward = AestheticScore(str(tmp_path / "clip"), head=str(tmp_path if kind == "folder" else file))

    images = pictures(3, (SIDE, SIDE + 3))  # where torchvision's crop is another than transformers'
    with torch.no_grad():
        seen = (
            model.vision_model(cropped_pixels(images, SIDE, rounding="torchvision")).pooler_output
            @ model.visual_projection.weight.T
        )
    x = seen.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for number in SIZES:
        x = x @ head[f"layers.{number}.weight"].double().numpy().T + head[f"layers.{number}.bias"].double().numpy()
    scores = reward.score(images, PROMPTS)
    np.testing.assert_allclose(scores, x[:, 0], atol=1e-5)
    assert x.std() > 0.01
    assert torch.equal(reward.score(images, ["another"] * 3), scores)


def test_another_head_is_refused(head, tmp_path):
    model = CLIPVisionModelWithProjection(clip()[0].config.vision_config)
    save_file({**head, "layers.0.weight": torch.ones(1024, 768)}, tmp_path / "head.safetensors")
    with pytest.raises(ConfigurationError, match="head.safetensors does not fit Sequential.*768"):
        AestheticScore(model, head=str(tmp_path / "head.safetensors"))
    save_file({"weight": torch.ones(3)}, tmp_path / "head.safetensors")
    with pytest.raises(ConfigurationError, match="Missing key"):
        AestheticScore(model, head=str(tmp_path / "head.safetensors"))
