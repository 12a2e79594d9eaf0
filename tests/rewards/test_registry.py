# SPDX-License-Identifier: Apache-2.0
"""Rewards by name, classes of one's own, and what is said of mistakes."""

import importlib
import sys

import pytest
import torch

from tests.rewards.tiny import PROMPTS, clip, pictures
from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.base import RewardInfo
from trl_sipo.rewards.clip_scores import PickScore
from trl_sipo.rewards.registry import REWARDS, load_reward

MINE = """
import torch
from trl_sipo.rewards.base import RewardInfo

class Width:
    def __init__(self, *, factor=1):
        self.info, self.factor = RewardInfo("width", "pixels", "MIT"), factor

    def score(self, media, prompts):
        return torch.tensor([float(self.factor * image.width) for image in media])

class Placed(Width):
    def __init__(self, needed, device):
        super().__init__(factor=needed)
        self.device = device

class NoReward:
    pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a user."""
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize("name", REWARDS)
def test_every_line_of_the_table_leads_somewhere(name):
    module, _, attribute = REWARDS[name].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_a_reward_by_name_gets_its_options():
    model, tokenizer = clip()
    reward = load_reward("pickscore", model=model, tokenizer=tokenizer, bare_cosine=True, device=torch.device("cpu"))
    assert isinstance(reward, PickScore) and reward.bare_cosine
    assert reward.score(pictures(), PROMPTS).abs().max() <= 1


def test_a_class_of_a_user(mine):
    reward = load_reward(f"{mine}:Width", factor=2, device="cuda")  # which it does not take
    assert reward.score(pictures(2, (5, 9)), PROMPTS[:2]).tolist() == [18, 18]
    assert load_reward(f"{mine}:Placed", needed=3, device="meta").device == "meta"
    assert isinstance(reward.info, RewardInfo)


@pytest.mark.parametrize("spec", ["pick_score", "", "my reward:Class", "a-b:Class", "my_rewards:"])
def test_unknown_names_list_the_known(spec):
    with pytest.raises(ConfigurationError) as raised:
        load_reward(spec)
    assert all(name in str(raised.value) for name in REWARDS)
    assert f"no reward {spec!r}" in str(raised.value) and "package.module:Class" in str(raised.value)


def test_what_is_wrong_with_a_class_of_a_user(mine, tmp_path):
    (tmp_path / "broken_rewards.py").write_text("import not_installed\n")
    for spec, message in {
        "not_there:Class": "cannot be imported: No module named 'not_there'.*PYTHONPATH",
        "broken_rewards:Class": "cannot be imported: No module named 'not_installed'",
        f"{mine}:Missing": "'my_rewards' has no attribute 'Missing'",
        f"{mine}:NoReward": "gives a NoReward, which lacks `info` or `score",
        f"{mine}:MINE": "has no attribute",
        f"{mine}:Placed": "missing a required argument: 'needed'. Its options: needed, device",
        f"{mine}:torch": "is no class or function",
    }.items():
        with pytest.raises(ConfigurationError, match=f"'{spec}'.*{message}"):
            load_reward(spec)
    with pytest.raises(ConfigurationError, match="unexpected keyword argument 'size'. Its options: factor"):
        load_reward(f"{mine}:Width", size=3)


def test_unknown_options_are_refused_before_weights_are_looked_for():
    with pytest.raises(ConfigurationError, match="unexpected keyword argument 'batchsize'. Its options: .*batch_size"):
        load_reward("pickscore", batchsize=3)
