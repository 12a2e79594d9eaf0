# SPDX-License-Identifier: Apache-2.0
"""Scores that are kept: found again for the same pixels, prompt and reward, by any process, and never otherwise."""

import json
import multiprocessing
import sqlite3

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rewards.tiny import PROMPTS, clip, pictures
from trl_sipo.errors import ConfigurationError, DatasetError, RewardError, StorageError
from trl_sipo.rewards.base import Reward, RewardInfo
from trl_sipo.rewards.cache import CachedReward
from trl_sipo.rewards.clip_scores import PickScore


class Counting:
    """The mean grey plus the length of the prompt, in thirds; counts what it is asked."""

    def __init__(self, version=1):
        self.info, self.version, self.asked = RewardInfo("counting", "thirds", "MIT"), version, 0

    def identity(self):
        return {"version": self.version}

    def score(self, media, prompts):
        self.asked += len(media)
        greys = [
            np.asarray(medium, dtype=np.float64).mean() + len(p) for medium, p in zip(media, prompts, strict=True)
        ]
        return torch.tensor([self.version * grey / 3 for grey in greys], dtype=torch.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores" / "all.db"


def test_a_score_is_computed_once(path):
    images, plain = pictures(3), Counting()
    expected = plain.score(images, PROMPTS)
    for asked in (3, 0):  # the second is a new object, as in another run
        reward = CachedReward(inner := Counting(), path)
        assert isinstance(reward, Reward) and reward.info == inner.info
        assert torch.equal(reward.score(images, PROMPTS), expected)  # all 24 bits
        assert inner.asked == asked
    assert torch.equal(reward.score(images[::-1], PROMPTS[::-1]), expected.flip(0)) and inner.asked == 0
    assert reward.score([], []).shape == (0,)


def test_only_what_is_new_is_computed(path, tmp_path):
    one, two, three = pictures(3)
    reward = CachedReward(inner := Counting(), path)
    reward.score([one, two], ["a", "b"])
    one.save(tmp_path / "one.png")
    again = Image.open(tmp_path / "one.png")
    scores = reward.score([again, three, two, three, one], ["a", "c", "b", "c", "b"])
    assert inner.asked == 2 + 2  # three with "c" once, one with "b"
    assert torch.equal(scores, Counting().score([one, three, two, three, one], ["a", "c", "b", "c", "b"]))
    video = np.stack([np.asarray(one)] * 2)
    assert reward.score([video, video[:1]], ["a", "a"]).tolist() == Counting().score([one, one], ["a", "a"]).tolist()
    assert inner.asked == 6


def test_another_reward_never_finds_them(path):
    images = pictures(3)
    CachedReward(Counting(), path).score(images, PROMPTS)
    second = CachedReward(inner := Counting(version=2), path)
    assert torch.equal(second.score(images, PROMPTS), Counting(version=2).score(images, PROMPTS)) and inner.asked == 3
    renamed = Counting()
    renamed.info = RewardInfo("counting", "sixths", "MIT")
    CachedReward(renamed, path).score(images, PROMPTS)
    assert renamed.asked == 3
    with sqlite3.connect(path) as database:
        stored = [json.loads(row[0]) for row in database.execute("SELECT identity FROM rewards")]
    assert len(stored) == 3 and {"version": 2} in [one["identity"] for one in stored]


def test_a_model_with_other_weights_never_finds_them(path):
    images = pictures(3)
    for seed in (0, 1, 0):
        model, tokenizer = clip(seed)
        plain = PickScore(model, tokenizer=tokenizer)
        assert torch.equal(CachedReward(plain, path).score(images, PROMPTS), plain.score(images, PROMPTS))
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM scores").fetchone() == (6,)


def test_a_reward_without_an_identity_needs_one(path):
    class Plain:
        info = RewardInfo("plain", "0", "MIT")

        def score(self, media, prompts):
            return torch.zeros(len(media))

    with pytest.raises(ConfigurationError, match=r"Plain \(plain\) has no `identity\(\)`.*Give `identity`"):
        CachedReward(Plain(), path)
    with pytest.raises(ConfigurationError, match="identity of plain must be numbers, .*not JSON serializable"):
        CachedReward(Plain(), path, identity={"dtype": torch.float32})
    assert CachedReward(Plain(), path, identity="plain, 1").score(pictures(1), ["a"]).tolist() == [0]


def test_a_cache_of_a_cache_is_another_reward(path):
    inner = CachedReward(Counting(), path)
    assert torch.equal(CachedReward(inner, path).score(pictures(), PROMPTS), Counting().score(pictures(), PROMPTS))


def test_what_fails_is_not_kept(path):
    class Failing(Counting):
        def score(self, media, prompts):
            if "bad" in prompts:
                raise RewardError("it failed")
            return super().score(media, prompts)

    reward = CachedReward(inner := Failing(), path)
    reward.score(pictures(1), ["good"])
    with pytest.raises(RewardError, match="it failed"):
        reward.score(pictures(2), ["good", "bad"])
    with pytest.raises(DatasetError, match="2 images or videos and 1 prompts"):
        reward.score(pictures(2), ["good"])
    reward.score(pictures(1), ["good"])
    assert inner.asked == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [([1.0, float("nan")], "gave nan for the prompt 'b'"), ([1.0], r"shape \(1,\) for 2 samples")],
)
def test_what_is_no_score_is_not_kept(answer, message, path):
    class Wrong(Counting):
        def score(self, media, prompts):
            return torch.tensor(answer)

    with pytest.raises(RewardError, match=message):
        CachedReward(Wrong(), path).score(pictures(2), ["a", "b"])
    CachedReward(inner := Counting(), path).score(pictures(2), ["a", "b"])
    assert inner.asked == 2


def test_an_interruption_loses_little(path, monkeypatch):
    monkeypatch.setattr("trl_sipo.rewards.cache._SCORED_AT_ONCE", 2)

    class Stopping(Counting):
        def score(self, media, prompts):
            if self.asked >= 4:
                raise KeyboardInterrupt
            return super().score(media, prompts)

    images, prompts = pictures(7), [str(number) for number in range(7)]
    with pytest.raises(KeyboardInterrupt):
        CachedReward(Stopping(), path).score(images, prompts)
    reward = CachedReward(inner := Counting(), path)
    assert torch.equal(reward.score(images, prompts), Counting().score(images, prompts)) and inner.asked == 3


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "text.db").write_text("this is no database, and long enough to be seen as none" * 20)
    with pytest.raises(StorageError, match="text.db' cannot be used: file is not a database"):
        CachedReward(Counting(), tmp_path / "text.db")
    with pytest.raises(ConfigurationError, match="is a folder. Give a file in it"):
        CachedReward(Counting(), tmp_path)
    with pytest.raises(StorageError, match="cannot be used"):
        CachedReward(Counting(), tmp_path / "text.db" / "scores.db")


@pytest.mark.parametrize("damaged", ["abc", float("inf"), b"123"])
def test_what_is_no_score_in_a_file_is_computed_again(damaged, path):
    reward = CachedReward(inner := Counting(), path)
    expected = reward.score(pictures(1), ["a"])
    with sqlite3.connect(path) as database:
        database.execute("UPDATE scores SET score = ?", (damaged,))
    assert torch.equal(reward.score(pictures(1), ["a"]), expected) and inner.asked == 2


def test_another_process_may_be_faster(path):
    class Overtaken(Counting):
        def score(self, media, prompts):
            CachedReward(Counting(), path).score(media, prompts)
            return super().score(media, prompts)

    images = pictures(3)
    assert torch.equal(CachedReward(Overtaken(), path).score(images, PROMPTS), Counting().score(images, PROMPTS))


def _score_all(path, start, results):
    images, prompts = pictures(60, (4, 4)), [str(number) for number in range(60)]
    start.wait()
    inner, found = Counting(), []
    for _ in range(3):  # opened anew, in parts, so that the two meet often
        for first in range(0, 60, 5):
            reward = CachedReward(inner, path)
            found += reward.score(images[first : first + 5], prompts[first : first + 5]).tolist()
    results.put((found, inner.asked))


def test_two_processes_share_a_file(path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_score_all, args=(path, start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = Counting().score(pictures(60, (4, 4)), [str(number) for number in range(60)]).tolist()
    assert [found for found, _ in answers] == [expected * 3] * 2
    assert 60 <= sum(asked for _, asked in answers) <= 120
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM scores").fetchone() == (60,)
