# SPDX-License-Identifier: Apache-2.0
"""The page on rewards: its examples run, and its table is the code's."""

import re
import sys
import types

import numpy as np
import pytest
import torch

from tests.docs.pages import SOURCE, blocks, read
from tests.rewards.tiny import clip, pictures
from trl_sipo.rewards.aesthetic import AestheticScore
from trl_sipo.rewards.clip_scores import CLIPScore, HPSv2, HPSv21, PickScore
from trl_sipo.rewards.image_reward import ImageReward
from trl_sipo.rewards.registry import REWARDS, load_reward

PAGE = SOURCE / "rewards.md"
EXAMPLES = blocks(PAGE, "python")
ROWS = [line.strip("| ").split(" | ") for line in read(PAGE).splitlines() if line.startswith("| `")]


def test_the_first_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for image, name in zip(pictures(2), ("sneaker", "bag"), strict=True):
        image.save(f"{name}.png")
    for part in clip(seed=2):
        part.save_pretrained("tiny")
    code = EXAMPLES[0].code.replace('"cuda"', '"cpu"').replace('"pickscore"', '"pickscore", model="tiny"')
    for _ in range(2):
        exec(compile(code, str(PAGE), "exec"), names := {})
    assert names["scores"].shape == (2,) and (tmp_path / "scores.db").is_file()
    assert capsys.readouterr().out.count("exp(logit_scale) cos(image, prompt) MIT") == 2


def test_the_example_of_ones_own(monkeypatch):
    module = types.ModuleType("my_rewards")
    exec(compile(EXAMPLES[1].code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    image = pictures(1)[0]
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    scores = load_reward("my_rewards:Contrast", frames_per_video=2).score([image, np.asarray(image)[None]], ["a", "b"])
    torch.testing.assert_close(scores, torch.tensor([grey.std()] * 2, dtype=torch.float32))


def test_the_tables_have_every_reward():
    assert {name for row in ROWS for name in re.findall(r"`([\w.-]+)`", row[0])} == set(REWARDS)


@pytest.mark.parametrize("reward", [AestheticScore, CLIPScore, HPSv2, HPSv21, ImageReward, PickScore])
def test_the_weights_of_the_table_are_the_defaults(reward):
    name = {value: key for key, value in REWARDS.items()}[f"{reward.__module__}:{reward.__name__}"]
    (row,) = [row for row in ROWS if f"`{name}`" in row[0]]
    defaults = [value for key, value in reward.__init__.__kwdefaults__.items() if key == "head"]
    defaults += reward.__init__.__defaults__ if reward is not CLIPScore else ["openai/clip-vit-base-patch32"]
    assert all(f"`{default}`" in row[3] for default in defaults)
