# SPDX-License-Identifier: Apache-2.0
"""The verifier as a reward: on detections made by hand, and on real detectors with random weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rewards.tiny import clip
from tests.tiny.detectors import tiny_grounding_dino, tiny_owlv2
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.rewards.base import Reward
from trl_sipo.rewards.colours import ClipColours, HsvColours
from trl_sipo.rewards.detection import DetectionVerifier, load_detection_verifier
from trl_sipo.rewards.detection_rules import DetectionRules, category_accuracies, verify
from trl_sipo.rewards.detectors import Detections
from trl_sipo.rewards.registry import load_reward
from trl_sipo.rewards.requirements import OBJECTS, parse


class BlockDetector:
    """Finds a dog at each square of red and a cat at each of blue, of 10x10 pixels: the truth is known."""

    name, licence, tokenizer = "blocks", "none", None

    def __init__(self):
        self.asked, self.settings = [], {}

    def detect(self, images, labels):
        self.asked.append((len(images), tuple(labels)))
        return [self._detections(np.asarray(image)) for image in images]

    def _detections(self, pixels):
        boxes, labels = [], []
        for top in range(0, pixels.shape[0], 10):
            for left in range(0, pixels.shape[1], 10):
                label = {(255, 0, 0): "dog", (0, 0, 255): "cat"}.get(tuple(pixels[top + 5, left + 5].tolist()))
                if label is not None:
                    boxes.append([left, top, left + 10, top + 10])
                    labels.append(label)
        return Detections(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), tuple(labels), torch.ones(len(boxes))
        )


def blocks(*rows):
    """An image of 10x10 pixels for each letter: r, b, or white."""
    image = Image.new("RGB", (10 * len(rows[0]), 10 * len(rows)), "white")
    for top, row in enumerate(rows):
        for left, letter in enumerate(row):
            colour = {"r": "red", "b": "blue"}.get(letter, "white")
            image.paste(colour, (10 * left, 10 * top, 10 * left + 10, 10 * top + 10))
    return image


SAMPLES = [
    (blocks("r..b"), "a photo of a dog left of a cat", 1.0, 1.0),
    (blocks("b..r"), "a photo of a dog left of a cat", 0.0, 2 / 3),
    (blocks("r...", "...."), "a photo of a dog and a cat", 0.0, 1 / 2),
    (blocks("r.r."), "a photo of two dogs", 1.0, 1.0),
    (blocks("r.rr"), "a photo of two dogs", 0.0, 0.0),
    (blocks("r..b"), "a photo of a red dog and a blue cat", 1.0, 1.0),
    (blocks("r..b"), "a photo of a blue dog and a blue cat", 0.0, 3 / 4),
    (blocks("...."), "a photo of a dog", 0.0, 0.0),
]
IMAGES, PROMPTS, CORRECT, SHARES = zip(*SAMPLES, strict=True)


def test_scores_are_the_truth_where_it_is_known():
    verifier = DetectionVerifier(BlockDetector(), HsvColours(), batch_size=3)
    scores = verifier.score(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32 and scores.tolist() == list(CORRECT)
    assert [size for size, _ in verifier.detector.asked] == [3, 3, 2]
    partial = DetectionVerifier(BlockDetector(), HsvColours(), partial=True)
    assert partial.score(IMAGES, PROMPTS).tolist() == pytest.approx(list(SHARES))


def test_details_make_a_table_of_categories():
    verifier = DetectionVerifier(BlockDetector(), HsvColours(), batch_size=3)
    verdicts = verifier.details(IMAGES, PROMPTS)
    assert [verdict.is_correct for verdict in verdicts] == [bool(correct) for correct in CORRECT]
    assert [verdict.prompt for verdict in verdicts] == list(PROMPTS)
    accuracies = category_accuracies(verdicts)
    expected = {"single_object": 0, "two_object": 0, "counting": 0.5, "position": 0.5, "color_attr": 0.5}
    assert accuracies == {**expected, "overall": pytest.approx(0.3)}


def test_the_detector_chooses_among_all_objects_or_those_of_the_prompt():
    verifier = DetectionVerifier(BlockDetector(), HsvColours())
    verifier.score(IMAGES, PROMPTS)
    assert verifier.detector.asked == [(8, OBJECTS)]
    verifier = DetectionVerifier(BlockDetector(), HsvColours(), vocabulary=["teddy bear"])
    assert verifier.score(IMAGES, PROMPTS).tolist() == list(CORRECT)
    assert verifier.detector.asked == [(5, ("teddy bear", "dog", "cat")), (3, ("teddy bear", "dog"))]


def test_a_prompt_that_cannot_be_verified_is_named_before_anything_is_computed():
    verifier = DetectionVerifier(BlockDetector(), HsvColours())
    for judge in (verifier.score, verifier.details):
        with pytest.raises(DatasetError, match="'a unicorn in the garden' cannot be verified"):
            judge(IMAGES[:2], [PROMPTS[0], "a unicorn in the garden"])
    assert verifier.detector.asked == []


def test_videos_are_refused():
    verifier = DetectionVerifier(BlockDetector(), HsvColours())
    for judge in (verifier.score, verifier.details):
        with pytest.raises(DatasetError, match="video"):
            judge([np.zeros((2, 20, 20, 3), dtype=np.uint8)], ["a photo of a dog"])


def test_it_says_what_it_is_and_is_not():
    verifier = DetectionVerifier(BlockDetector(), HsvColours())
    assert isinstance(verifier, Reward)
    assert verifier.info.name == "blocks_verifier" and "GenEval's rules, not its detector" in verifier.info.convention
    assert verifier.identity() != DetectionVerifier(BlockDetector(), HsvColours(), partial=True).identity()
    rules = DetectionRules(threshold=0.2)
    assert verifier.identity() != DetectionVerifier(BlockDetector(), HsvColours(), rules=rules).identity()


NOISE = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 60, 3), dtype=np.uint8)) for n in range(4)]
ASKED = [
    "a photo of a dog",
    "a photo of two cats",
    "a photo of a red apple and a green book",
    "a photo of a tie above an oven",
]


@pytest.mark.parametrize("make", [tiny_owlv2, tiny_grounding_dino])
def test_with_a_real_detector_and_clip(make):
    """Of random weights: the score is that of the rules on what the detector gives."""
    detector, colours = make(), ClipColours(*clip(max_length=32))
    names = ["dog", "cat", "apple", "book", "tie", "oven"]  # random weights would find 80 only by chance
    rules = DetectionRules(threshold=0.1, counting_threshold=0.1, max_overlap=0.9)
    verifier = DetectionVerifier(detector, colours, rules=rules, vocabulary=names, partial=True, batch_size=3)
    scores = verifier.score(NOISE, ASKED)
    for image, prompt, score in zip(NOISE, ASKED, scores.tolist(), strict=True):
        (found,) = detector.detect([image], names)
        assert score == pytest.approx(verify(image, prompt, parse(prompt), found, colours, rules).share)
    assert scores.max() > 0


@pytest.mark.parametrize("detector", ["owlv2", "grounding_dino"])
def test_loaded_by_name(detector, tmp_path):
    saved = {"owlv2": tiny_owlv2, "grounding_dino": tiny_grounding_dino}[detector]()
    for part in ("model", "tokenizer", "image_processor"):
        if hasattr(saved, part):
            getattr(saved, part).save_pretrained(tmp_path / "detector")
    for part in clip(max_length=32):
        part.save_pretrained(tmp_path / "clip")
    options = {"model": str(tmp_path / "detector"), "clip_model": str(tmp_path / "clip"), "threshold": 0.2}
    reward = load_reward(f"{detector}_verifier", **options, partial=True)
    rules = DetectionRules(threshold=0.2, counting_threshold=0.3)
    expected = DetectionVerifier(saved, ClipColours(*clip(max_length=32)), rules=rules, partial=True)
    assert reward.info == expected.info and reward.info.licence == "Apache-2.0"
    assert reward.score(NOISE, ASKED).tolist() == expected.score(NOISE, ASKED).tolist()
    assert reward.identity() == load_reward(f"{detector}_verifier", **options, partial=True).identity()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("mask2former",), {}, "detector='mask2former' is not known; there are owlv2, grounding_dino"),
        (("owlv2",), {"colours": "eyes"}, "colours='eyes' is not known"),
        (("owlv2",), {"threshold": 30}, "`threshold` of the verifier must be from 0 to 1, got 30"),
    ],
)
def test_settings_that_are_wrong(arguments, options, message):
    with pytest.raises(ConfigurationError, match=message):
        load_detection_verifier(*arguments, **options)
