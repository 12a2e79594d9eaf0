# SPDX-License-Identifier: Apache-2.0
"""The rules of GenEval, on boxes made by hand."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.colours import HsvColours
from trl_sipo.rewards.detection_rules import (
    DetectionRules,
    Part,
    Verdict,
    believed_boxes,
    category_accuracies,
    cut_out,
    non_maximum_suppression,
    overlap,
    relations,
    verify,
)
from trl_sipo.rewards.detectors import Detections
from trl_sipo.rewards.requirements import OPPOSITE, parse

RULES = DetectionRules(counting_threshold=0.6)
LEFT, RIGHT, TOP, BOTTOM = (0, 40, 20, 60), (80, 40, 100, 60), (40, 0, 60, 20), (40, 80, 60, 100)


def detections(*found):
    """(label, score, box) of each."""
    return Detections(
        torch.tensor([box for _, _, box in found], dtype=torch.float32).reshape(-1, 4),
        tuple(label for label, _, _ in found),
        torch.tensor([score for _, score, _ in found], dtype=torch.float32),
    )


def painted(**colours):
    """A white image of 100x100 with a rectangle of each colour, such as red=LEFT."""
    image = Image.new("RGB", (100, 100), "white")
    for colour, box in colours.items():
        image.paste(colour, box)
    return image


def judged(prompt, *found, image=None):
    """What the rules say of detections made by hand."""
    return verify(image or painted(), prompt, parse(prompt), detections(*found), HsvColours(), RULES)


@pytest.mark.parametrize(
    ("prompt", "found", "is_correct"),
    [
        ("a photo of a dog", [("dog", 0.31, LEFT)], True),
        ("a photo of a dog", [("dog", 0.3, LEFT)], False),  # has to be above the threshold
        ("a photo of a dog", [("cat", 0.9, LEFT)], False),
        ("a photo of a dog", [("dog", 0.9, LEFT), ("dog", 0.9, RIGHT), ("cat", 0.9, TOP)], True),  # more are no harm
        ("a photo of a dog", [], False),
        ("a photo of two dogs", [("dog", 0.9, LEFT), ("dog", 0.8, RIGHT)], True),
        ("a photo of two dogs", [("dog", 0.9, LEFT)], False),
        ("a photo of two dogs", [("dog", 0.9, LEFT), ("dog", 0.9, RIGHT), ("dog", 0.9, TOP)], False),  # exactly two
        ("a photo of two dogs", [("dog", 0.9, LEFT), ("dog", 0.9, RIGHT), ("dog", 0.5, TOP)], True),  # 0.5 < 0.6
        ("a photo of two dogs", [("dog", 0.9, LEFT), ("dog", 0.9, (1, 41, 20, 60))], False),  # one dog seen twice
        ("a photo of a dog and a cat", [("dog", 0.4, LEFT), ("cat", 0.4, LEFT)], True),
        ("a photo of a dog and a cat", [("dog", 0.4, LEFT), ("dog", 0.4, RIGHT)], False),
        ("a photo of a dog left of a cat", [("dog", 0.4, LEFT), ("cat", 0.4, RIGHT)], True),
        ("a photo of a dog right of a cat", [("dog", 0.4, LEFT), ("cat", 0.4, RIGHT)], False),
        ("a photo of a dog above a cat", [("dog", 0.4, TOP), ("cat", 0.4, BOTTOM)], True),
        ("a photo of a dog below a cat", [("dog", 0.4, TOP), ("cat", 0.4, BOTTOM)], False),
        ("a photo of a dog left of a cat", [("dog", 0.4, LEFT)], False),
        # Of several dogs the surest one counts.
        ("a photo of a dog left of a cat", [("dog", 0.4, LEFT), ("dog", 0.5, RIGHT), ("cat", 0.4, TOP)], False),
        ("a photo of a dog left of a cat", [("dog", 0.5, LEFT), ("dog", 0.4, RIGHT), ("cat", 0.4, TOP)], True),
        ("a photo of a dog left of a cat", [("dog", 0.5, TOP), ("cat", 0.4, LEFT), ("cat", 0.5, RIGHT)], True),
        ("a photo of two dogs left of a cat", [("dog", 0.7, LEFT), ("dog", 0.8, TOP), ("cat", 0.7, RIGHT)], True),
        ("a photo of two dogs left of a cat", [("dog", 0.7, LEFT), ("dog", 0.8, RIGHT), ("cat", 0.7, TOP)], False),
    ],
)
def test_objects_numbers_and_places(prompt, found, is_correct):
    assert judged(prompt, *found).is_correct is is_correct


@pytest.mark.parametrize(
    ("prompt", "is_correct"),
    [
        ("a photo of a red apple", True),
        ("a photo of a green apple", False),
        ("a photo of a red apple and a green book", True),
        ("a photo of a green apple and a red book", False),
        ("a photo of a red apple and a red book", False),
        ("a photo of a red apple left of a green book", True),
    ],
)
def test_colours_belong_to_their_objects(prompt, is_correct):
    image = painted(red=LEFT, green=RIGHT)
    assert judged(prompt, ("apple", 0.9, LEFT), ("book", 0.9, RIGHT), image=image).is_correct is is_correct


def test_the_colour_is_that_of_the_surest_ones():
    image = painted(red=LEFT, green=RIGHT)
    assert judged("a photo of a red apple", ("apple", 0.5, LEFT), ("apple", 0.4, RIGHT), image=image).is_correct
    assert not judged("a photo of a red apple", ("apple", 0.4, LEFT), ("apple", 0.5, RIGHT), image=image).is_correct
    assert not judged("a photo of two red apples", ("apple", 0.7, LEFT), ("apple", 0.7, RIGHT), image=image).is_correct


def test_parts_say_what_is_missing():
    image = painted(red=LEFT, blue=RIGHT)
    verdict = judged("a photo of a red apple left of a green book", ("apple", 0.9, LEFT), image=image)
    assert verdict.category == "position" and not verdict.is_correct
    assert verdict.parts == (
        Part("an apple", "1 apple", True),
        Part("apple is red", "red", True),
        Part("a book", "0 books", False),
        Part("book is green", "none", False),
        Part("apple left of book", "not both", False),
    )
    assert verdict.share == pytest.approx(2 / 5)
    counted = judged("a photo of two dogs", ("dog", 0.9, LEFT), ("dog", 0.9, RIGHT), ("dog", 0.9, TOP))
    assert counted.parts == (Part("2 dogs", "3 dogs", False),)


def test_the_margin_of_a_place_is_a_tenth_of_both_sizes():
    """Two boxes of 20x20: centres 4 pixels apart across are at the margin, 0.1 * (20 + 20); the distance is 4."""
    box = torch.tensor([50.0, 50, 70, 70])

    def at(across, down=0.0):
        return relations(box + torch.tensor([across, down, across, down]), box, 0.1)

    assert at(-4) == at(4) == at(0, 4) == at(0) == set()
    # (x - 4) / x is more than a half from x = 8 on.
    assert at(-7.9) == set() and at(-8.1) == {"left of"} and at(8.1) == {"right of"}
    assert at(0, -8.1) == {"above"} and at(0, 8.1) == {"below"}
    # On the diagonal (x - 4) / (1.414 x) is more than a half from x = 4 / (1 - 0.7071) = 13.66 on.
    assert at(13.5, 13.5) == set() and at(13.8, 13.8) == {"right of", "below"}


corners = st.tuples(*[st.integers(0, 60)] * 4).map(lambda c: (c[0], c[1], c[0] + 1 + c[2], c[1] + 1 + c[3]))


@given(corners, corners, st.sampled_from([0.0, 0.1, 0.3]))
def test_places_are_opposite_from_the_other_side(box, other, margin):
    box, other = (torch.tensor(corner, dtype=torch.float32) for corner in (box, other))
    assert relations(box, other, margin) == {OPPOSITE[name] for name in relations(other, box, margin)}


def area(box):
    """Of a rectangle in whole pixels, by counting them."""
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@given(st.lists(corners, min_size=1, max_size=4))
def test_overlap_is_that_of_counted_pixels(boxes):
    overlaps = overlap(torch.tensor(boxes, dtype=torch.float32))
    for (row, one), (column, other) in itertools.product(enumerate(boxes), repeat=2):
        shared, union = area(one) & area(other), area(one) | area(other)
        assert overlaps[row, column].item() == pytest.approx(len(shared) / len(union), rel=1e-5)


@given(
    st.lists(st.tuples(corners, st.integers(0, 100)), min_size=1, max_size=8), st.sampled_from([0.0, 0.3, 0.7, 1.0])
)
def test_suppression_keeps_what_no_surer_kept_box_covers(found, limit):
    boxes = torch.tensor([box for box, _ in found], dtype=torch.float32)
    scores = torch.tensor([score / 100 for _, score in found])
    kept = non_maximum_suppression(boxes, scores, limit).tolist()
    assert [scores[index].item() for index in kept] == sorted((scores[index].item() for index in kept), reverse=True)
    overlaps = overlap(boxes)
    for index in range(len(found)):
        covered = any(
            scores[other] >= scores[index] and overlaps[index, other] > limit for other in kept if other != index
        )
        assert (index in kept) != covered
    if limit == 1:
        assert len(kept) == len(found)  # nothing overlaps by more than all of it


def test_no_boxes():
    assert len(non_maximum_suppression(torch.zeros(0, 4), torch.zeros(0), 0.5)) == 0
    assert overlap(torch.zeros(2, 4)).tolist() == [[0, 0], [0, 0]]


def test_only_so_many_boxes_count_and_doubles_take_no_place():
    rules = DetectionRules(max_objects=2)
    found = [("dog", 0.9, LEFT), ("dog", 0.89, LEFT), ("dog", 0.8, RIGHT), ("dog", 0.7, TOP), ("cat", 0.2, TOP)]
    boxes = believed_boxes(detections(*found), 0.3, rules)
    assert list(boxes) == ["dog"] and boxes["dog"].tolist() == [list(LEFT), list(RIGHT)]


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((10.4, 10.4, 30.4, 20.4), (20, 10)),
        ((-10, -10, 10, 10), (10, 10)),
        ((90, 90, 130, 130), (10, 10)),
        ((5, 5, 5, 5), (1, 1)),
        ((150, -50, 180, -20), (1, 1)),
    ],
)
def test_what_is_cut_out_lies_in_the_image(box, size):
    assert cut_out(painted(), torch.tensor(box, dtype=torch.float32)).size == size


def test_accuracies_are_means_of_categories_of_any_size():
    def verdicts(category, *correct):
        return [Verdict("a prompt", category, (Part("a dog", "a dog", one),)) for one in correct]

    accuracies = category_accuracies(
        verdicts("counting", True, False, False, False) + verdicts("single_object", True) + verdicts("position", False)
    )
    assert accuracies == {
        "single_object": 1.0,
        "counting": 0.25,
        "position": 0.0,
        "overall": pytest.approx(1.25 / 3),
    }
    with pytest.raises(ConfigurationError, match="no images were verified"):
        category_accuracies([])


@pytest.mark.parametrize("values", [{"threshold": 1.1}, {"max_overlap": -0.1}, {"max_objects": 0}])
def test_rules_out_of_range(values):
    (name,) = values
    with pytest.raises(ConfigurationError, match=f"`{name}` of the verifier must be"):
        DetectionRules(**values)
