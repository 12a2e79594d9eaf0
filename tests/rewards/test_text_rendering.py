# SPDX-License-Identifier: Apache-2.0
"""Text in images: what is quoted, how far two texts are apart, and what is read."""

import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.registry import load_reward
from trl_sipo.rewards.text_rendering import TextRendering, edit_distance, likeness, quoted_text


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says 'Open 24 h'", "Open 24 h"),
        ("a dog's bone beside a sign 'It is Tom's' here", "It is Tom's"),
        ("signs that say ‘It’s on’ and ‘off’", "It’s on off"),
        ("a sign that says “OPEN”, and ‘NOW’", "OPEN NOW"),
        ("ein Schild «Zu» und 「開」", "Zu 開"),
        ("a dog's bone and a cat's toy, \"mine\"", "mine"),
    ],
)
def test_what_is_quoted(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a sign", "a dog's bone and a cat's toy", 'a sign that says ""', 'a sign " "', ""])
def test_a_prompt_that_quotes_nothing_is_named(prompt):
    with pytest.raises(DatasetError, match="quotes no text") as raised:
        quoted_text(prompt)
    assert repr(prompt) in str(raised.value)


def recursive_distance(text, other):
    """By its definition."""

    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (text[i - 1] != other[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(text), len(other))


words = st.text(alphabet="abc ", max_size=9)


@given(words, words)
def test_the_edit_distance_is_that_of_its_definition(text, other):
    assert edit_distance(text, other) == recursive_distance(text, other)


@pytest.mark.parametrize(
    ("text", "other", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)]
)
def test_known_edit_distances(text, other, distance):
    assert edit_distance(text, other) == edit_distance(other, text) == distance


@given(words, words)
def test_likeness_is_between_nothing_and_all(text, other):
    assert 0 <= likeness(text, other) <= 1
    assert likeness(text, text.upper()) == 1
    assert (likeness(text, other) == 1) == ("".join(text.split()) == "".join(other.split()))


def read_size(image):
    """A reader that sees the width of an image as its text."""
    return [f"width {image.width}"] if image.width > 10 else []


def test_scores_by_a_reader_of_ones_own():
    images = [Image.new(mode, (width, 20)) for mode, width in (("RGB", 64), ("L", 65), ("RGB", 10), ("RGBA", 64))]
    prompts = ['"Width 64"', '"width 64"', '"width 64"', '"width 64" and "more"']
    reward = TextRendering(read_size, batch_size=2)
    assert isinstance(reward, Reward) and reward.identity()["settings"] == {"reader": "read_size"}
    scores = reward.score(images, prompts)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([1, 1 - 1 / 7, 0, 1 - 4 / 11])
    with pytest.raises(DatasetError, match="'a sign' quotes no text"):
        reward.score(images[:2], [prompts[0], "a sign"])
    video = np.zeros((4, 20, 64, 3), dtype=np.uint8)
    with pytest.raises(DatasetError, match="video"):
        reward.score([video], prompts[:1])
    assert TextRendering(read_size, frames_per_video=2).score([video], prompts[:1]).tolist() == [1]


def test_without_rapidocr_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'trl-sipo\[ocr\]'"):
        load_reward("text_rendering")


def test_rapidocr_reads_what_is_written():
    pytest.importorskip("rapidocr", exc_type=ImportError)

    def written(text):
        image = Image.new("RGB", (400, 120), "white")
        ImageDraw.Draw(image).text((30, 30), text, fill="black", font=ImageFont.load_default(48))
        return image

    reward = load_reward("text_rendering")
    images = [written("OPEN NOW"), written("CLOSED"), Image.new("RGB", (400, 120), "white")]
    scores = reward.score(images, ['a sign that says "Open now"'] * 3).tolist()
    assert scores[0] == 1 and scores[1] < 0.5 and scores[2] == 0
