# SPDX-License-Identifier: Apache-2.0
"""Composed requirements: GenEval's numbers, no one twice, held-out objects kept out, the same for the same seed."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sipo.errors import ConfigurationError
from trl_sipo.generation.composing import NUMBERS, compose, split_objects
from trl_sipo.rewards.requirements import OBJECTS, OPPOSITE, Requirement, describe, parse


def meaning(requirement):
    """The same for what is said from either side."""
    relation = requirement.relation
    turned = Requirement(requirement.objects[::-1], OPPOSITE.get(relation)) if len(requirement.objects) == 2 else None
    return frozenset([requirement, turned or requirement])


def names(requirements):
    return {required.name for requirement in requirements for required in requirement.objects}


def test_the_structure_is_that_of_geneval():
    requirements = compose()
    counts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert Counter(requirement.category for requirement in requirements) == counts == NUMBERS
    assert len(requirements) == 553
    assert len({meaning(requirement) for requirement in requirements}) == 553
    assert [parse(describe(requirement)) for requirement in requirements] == requirements
    singles = requirements[:80]
    assert names(singles) == set(OBJECTS) and singles != sorted(
        singles, key=lambda one: OBJECTS.index(one.objects[0].name)
    )
    coloured = [required for requirement in requirements for required in requirement.objects if required.colour]
    assert "person" not in {required.name for required in coloured}
    assert len({required.colour for required in coloured}) == 10
    counted = [r.objects[0] for r in requirements if r.category == "counting"]
    assert {required.count for required in counted} == {2, 3, 4} and not {"skis", "scissors"} & {
        r.name for r in counted
    }
    assert {r.relation for r in requirements} == {None, *OPPOSITE}


def test_either_side_of_a_pair_is_said_first():
    firsts = [r.objects for r in compose({"position": 200, "two_object": 200, "color_attr": 200})]
    in_order = sum(OBJECTS.index(one.name) < OBJECTS.index(other.name) for one, other in firsts)
    assert 240 < in_order < 360  # of 600, 12 is a standard deviation


def test_the_seed_decides():
    assert compose(50, seed=3) == compose(50, seed=3) != compose(50, seed=4)


def test_categories_are_independent_of_one_another():
    colours = compose({"colors": 10})
    assert compose({"single_object": 5, "colors": 10})[5:] == colours


@given(st.integers(1, 800))
def test_any_number_in_proportion(total):
    counts = Counter(requirement.category for requirement in compose(total))
    assert counts.total() == total
    for category, number in NUMBERS.items():
        if category != "single_object" and counts["single_object"] < 80:
            assert abs(counts[category] - total * number / 553) < 1


@pytest.mark.parametrize("total", [377, 522])
def test_proportions_are_rounded_to_the_nearest(total):
    """Where rounded numbers add up to the total. Other methods round these otherwise."""
    rounded = {category: round(total * number / 553) for category, number in NUMBERS.items()}
    assert sum(rounded.values()) == total
    assert Counter(requirement.category for requirement in compose(total)) == rounded


def test_all_there_are():
    objects = OBJECTS[:3]  # person, bicycle, car
    sizes = {"single_object": 3, "two_object": 3, "counting": 9, "colors": 20, "position": 12, "color_attr": 90}
    every = compose(sum(sizes.values()), objects=objects)
    assert Counter(requirement.category for requirement in every) == sizes
    assert len({meaning(requirement) for requirement in every}) == 137
    assert Counter(r.category for r in compose(objects=objects)) == {**sizes, "counting": 9}
    with pytest.raises(ConfigurationError, match="138 prompts were asked for; of these objects 1 to 137"):
        compose(138, objects=objects)


def test_held_out_objects_are_in_no_prompt():
    train, test = split_objects()
    assert len(train) == len(test) == 40 and set(train) | set(test) == set(OBJECTS)
    assert names(compose(100, exclude_objects=test)) <= set(train)
    assert names(compose(100, only_objects=test)) <= set(test)
    assert names(compose(only_objects=test, exclude_objects=test[:30])) <= set(test[30:])
    assert compose(100, only_objects=train) == compose(100, exclude_objects=test)
    few = split_objects(test_share=0.25, seed=1)
    assert [len(part) for part in few] == [60, 20] and few != split_objects(test_share=0.25, seed=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compose({"colours": 1}), "there is no category 'colours'"),
        (lambda: compose({"single_object": 81}), "81 prompts of 'single_object' were asked for"),
        (lambda: compose({"counting": -1}), "-1 prompts of 'counting'"),
        (lambda: compose(0), "0 prompts were asked for"),
        (lambda: compose(only_objects=["unicorn"]), "no object 'unicorn'"),
        (lambda: compose(exclude_objects=["unicorn"]), "no object 'unicorn'"),
        (lambda: compose(10, only_objects=[]), "10 prompts were asked for; of these objects 1 to 0"),
        (lambda: split_objects(test_share=0.01), "test_share=0.01 of 80 objects"),
    ],
)
def test_what_cannot_be_composed(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
