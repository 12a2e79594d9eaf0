# SPDX-License-Identifier: Apache-2.0
"""OWLv2 and Grounding DINO with random weights: what they give, against transformers' own way and by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Owlv2ImageProcessorPil

from tests.tiny.detectors import OWLV2_SIDE, tiny_grounding_dino, tiny_owlv2
from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.detectors import GroundingDinoDetector, Owlv2Detector, owlv2_pixels
from trl_sipo.rewards.requirements import OBJECTS

LABELS = ("dog", "wine glass", "apple", "toothbrush")


def noise(*sizes, seed=0):
    """One image per (width, height)."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def smooth(width, height):
    """A picture without fine detail."""
    y, x = np.mgrid[:height, :width]
    channels = [np.sin(x / 17) + 1, np.cos(y / 13) + 1, np.sin((x + y) / 23) + 1]
    return Image.fromarray((127 * np.stack(channels, axis=-1)).astype(np.uint8))


def test_owlv2_is_as_transformers_has_it():
    detector = tiny_owlv2()
    images = noise((48, 48), (48, 30), (20, 48))  # of which none has to be scaled
    processor = Owlv2ImageProcessorPil(size={"height": OWLV2_SIDE, "width": OWLV2_SIDE})
    texts = ["a photo of a dog", "a photo of a wine glass", "a photo of an apple", "a photo of a toothbrush"]
    tokens = detector.tokenizer(texts * len(images), padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
        output = detector.model(pixel_values=processor(images, return_tensors="pt").pixel_values, **tokens)
    sizes = [(image.height, image.width) for image in images]
    expected = processor.post_process_object_detection(output, threshold=-1.0, target_sizes=sizes)
    found = detector.detect(images, LABELS)
    assert len(found) == 3
    for detections, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(detections.boxes, wanted["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(detections.scores, wanted["scores"], rtol=1e-4, atol=1e-5)
        assert detections.labels == tuple(LABELS[index] for index in wanted["labels"])
    assert len({label for detections in found for label in detections.labels}) > 1


@pytest.mark.parametrize("size", [(30, 40), (96, 96), (200, 130)])
def test_owlv2_sees_pictures_as_transformers_shows_them(size):
    picture = smooth(*size)
    shown = Owlv2ImageProcessorPil(size={"height": 48, "width": 48})([picture], return_tensors="pt").pixel_values
    seen = owlv2_pixels([picture], 48)
    assert seen.shape == (1, 3, 48, 48) and seen.dtype == torch.float32
    # They smooth with a Gaussian where it shrinks, we with a triangle: they differ a little. Edges are left out.
    width, height = (48 * length // max(size) for length in size)
    inside = (..., slice(2, height - 3), slice(2, width - 3))
    torch.testing.assert_close(seen[inside], shown[inside], rtol=0, atol=0.06)
    black = (0 - 0.48145466) / 0.26862954
    if height < 46:
        torch.testing.assert_close(seen[0, 0, height + 3 :], torch.full_like(seen[0, 0, height + 3 :], black))


def test_grounding_dino_by_hand():
    detector = tiny_grounding_dino()
    (image,) = noise((64, 48))
    caption = "dog. wine glass. apple. toothbrush."
    tokens = detector.tokenizer(caption, return_tensors="pt")
    words = detector.tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])
    assert words[1:-1] == ["dog", ".", "wine", "glass", ".", "apple", ".", "tooth", "##brush", "."]
    with torch.no_grad():
        output = detector.model(**detector.image_processor([image], return_tensors="pt"), **tokens)
    probabilities = output.logits[0].sigmoid()  # (12 boxes, 256 tokens)
    pieces = {"dog": [1], "wine glass": [3, 4], "apple": [6], "toothbrush": [8, 9]}
    (found,) = detector.detect([image], LABELS)
    for row in range(12):
        scores = {label: sum(probabilities[row, p].item() for p in at) / len(at) for label, at in pieces.items()}
        best = max(scores, key=scores.get)
        assert found.labels[row] == best
        assert found.scores[row].item() == pytest.approx(scores[best], abs=1e-5)
        x, y, width, height = output.pred_boxes[0, row].tolist()
        edges = [64 * (x - width / 2), 48 * (y - height / 2), 64 * (x + width / 2), 48 * (y + height / 2)]
        assert found.boxes[row].tolist() == pytest.approx(edges, abs=1e-3)
    assert len(set(found.labels)) > 1


@pytest.mark.parametrize("make", [tiny_owlv2, tiny_grounding_dino])
def test_what_is_found_does_not_depend_on_the_batch(make):
    detector = make()
    images = noise((60, 40), (40, 60), (60, 40), (50, 50))
    together = detector.detect(images, LABELS)
    for image, found in zip(images, together, strict=True):
        (alone,) = detector.detect([image], LABELS)
        torch.testing.assert_close(found.boxes, alone.boxes, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-3, atol=1e-4)
        assert found.labels == alone.labels
        assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert not torch.equal(together[0].scores, together[2].scores)  # of images of one size, each its own


def test_all_objects_fit_into_the_caption_and_too_many_are_refused():
    detector = tiny_grounding_dino()
    (image,) = noise((60, 60))
    (found,) = detector.detect([image], OBJECTS)
    assert set(found.labels) <= set(OBJECTS) and found.scores.isfinite().all()
    with pytest.raises(ConfigurationError, match="160 names are 3[0-9]{2} tokens, and this detector reads 256"):
        detector.detect([image], [*OBJECTS, *OBJECTS])


@pytest.mark.parametrize(
    ("make", "kind"),
    [(tiny_owlv2, Owlv2Detector), (tiny_grounding_dino, GroundingDinoDetector)],
    ids=["owlv2", "dino"],
)
def test_what_was_saved_finds_the_same(make, kind, tmp_path):
    detector = make()
    for part in ("model", "tokenizer", "image_processor"):
        if hasattr(detector, part):
            getattr(detector, part).save_pretrained(tmp_path)
    images = noise((60, 40))
    (found,), (again,) = detector.detect(images, LABELS), kind.from_pretrained(str(tmp_path)).detect(images, LABELS)
    assert torch.equal(found.boxes, again.boxes) and torch.equal(found.scores, again.scores)
    assert found.labels == again.labels


def test_how_large_images_are_made_is_told(tmp_path):
    detector = tiny_grounding_dino()
    before = detector.settings
    detector.image_processor.size = {"shortest_edge": 48, "longest_edge": 80}
    assert detector.settings != before == tiny_grounding_dino().settings
    detector.model.save_pretrained(tmp_path)
    detector.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="preprocessor_config.json of .* does not load"):
        GroundingDinoDetector.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("kind", [Owlv2Detector, GroundingDinoDetector])
def test_weights_that_are_not_there(kind, tmp_path):
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        kind.from_pretrained(str(tmp_path / "absent"))
