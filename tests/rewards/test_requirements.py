# SPDX-License-Identifier: Apache-2.0
"""What a prompt asks for: text and data are inverse of one another, and what cannot be read is refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.rewards.requirements import (
    CATEGORIES,
    COLOURS,
    OBJECTS,
    OPPOSITE,
    RELATIONS,
    RequiredObject,
    Requirement,
    describe,
    parse,
    plural,
)

PHRASES = {
    "a photo of a bench": ("single_object", Requirement((RequiredObject("bench"),))),
    "a photo of two clocks": ("counting", Requirement((RequiredObject("clock", 2),))),
    "a photo of a red apple": ("colors", Requirement((RequiredObject("apple", colour="red"),))),
    "a photo of an orange orange": ("colors", Requirement((RequiredObject("orange", colour="orange"),))),
    "a photo of four wine glasses": ("counting", Requirement((RequiredObject("wine glass", 4),))),
    "a photo of scissors": ("single_object", Requirement((RequiredObject("scissors"),))),
    "a photo of a zebra and an umbrella": (
        "two_object",
        Requirement((RequiredObject("zebra"), RequiredObject("umbrella"))),
    ),
    "a photo of a dog left of a teddy bear": (
        "position",
        Requirement((RequiredObject("dog"), RequiredObject("teddy bear")), "left of"),
    ),
    "a photo of a red apple and a green book": (
        "color_attr",
        Requirement((RequiredObject("apple", colour="red"), RequiredObject("book", colour="green"))),
    ),
    "a photo of two black cats above an orange": (
        "position",
        Requirement((RequiredObject("cat", 2, "black"), RequiredObject("orange")), "above"),
    ),
}


@pytest.mark.parametrize("prompt", PHRASES)
def test_prompts_as_they_are_meant(prompt):
    category, requirement = PHRASES[prompt]
    assert describe(requirement) == prompt
    assert parse(prompt) == requirement
    assert requirement.category == category


@st.composite
def requirements(draw):
    """Any requirement that can be made."""
    names = draw(st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=2, unique=True))
    colours = st.none() | st.sampled_from(COLOURS)
    objects = tuple(RequiredObject(name, draw(st.integers(1, 10)), draw(colours)) for name in names)
    relation = draw(st.none() | st.sampled_from(RELATIONS)) if len(names) == 2 else None
    return Requirement(objects, relation)


@given(requirements())
def test_parse_undoes_describe(requirement):
    prompt = describe(requirement)
    assert parse(prompt) == requirement
    assert describe(parse(prompt)) == prompt
    assert requirement.category in CATEGORIES


@given(st.text(alphabet="abdefgnoprtuw 2,.", max_size=40))
def test_any_other_text_is_refused_by_name_or_read_as_what_describes_it(text):
    try:
        requirement = parse(f"a photo of {text}")
    except DatasetError as error:
        assert repr(f"a photo of {text}") in str(error)
    else:
        assert parse(describe(requirement)) == requirement


def test_the_tables_are_those_of_coco_and_of_geneval():
    assert len(OBJECTS) == len(set(OBJECTS)) == 80
    assert len(COLOURS) == len(set(COLOURS)) == 10
    assert {OPPOSITE[OPPOSITE[relation]] for relation in RELATIONS} == set(RELATIONS)
    assert len({plural(name) for name in OBJECTS}) == 80  # so that a plural says which object is meant


def test_words_of_the_grammar_are_in_no_name():
    words = {word for name in OBJECTS for word in (*name.split(), *plural(name).split())}
    assert not words & {"a", "an", "and", "of", "left", "right", "above", "below", "one", "two"}


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("bus", "buses"),
        ("bench", "benches"),
        ("toothbrush", "toothbrushes"),
        ("knife", "knives"),
        ("person", "people"),
        ("sheep", "sheep"),
        ("computer mouse", "computer mice"),
        ("hot dog", "hot dogs"),
        ("skis", "skis"),
    ],
)
def test_plurals(name, many):
    assert plural(name) == many


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("A photo of a  Bench.", "a photo of a bench"),
        ("a photo of three benchs", "a photo of three benches"),
        ("a photo of two sheeps", "a photo of two sheep"),
        ("a photo of a orange", "a photo of an orange"),
        ("a photo of a scissors", "a photo of scissors"),
        ("a photo of an orange scissors", "a photo of orange scissors"),
        ("a photo of one dog below one cat", "a photo of a dog below a cat"),
    ],
)
def test_what_geneval_and_people_write_is_read_too(prompt, same):
    assert describe(parse(prompt)) == same


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_as_geneval_writes_it(name):
    """Its generator puts "a" or "an" before every name, and adds "s", or "es" after an "s"."""
    article, many = "an" if name[0] in "aeiou" else "a", name + ("es" if name[-1] == "s" else "s")
    assert parse(f"a photo of {article} {name}") == Requirement((RequiredObject(name),))
    assert parse(f"a photo of three {many}") == Requirement((RequiredObject(name, 3),))
    assert parse(f"a photo of an orange {name}") == Requirement((RequiredObject(name, colour="orange"),))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a painting of a bench", "does not begin with 'a photo of'"),
        ("a photo of", "does not begin"),
        ("a photo of a unicorn", "'a unicorn' is no number"),
        ("a photo of two bench", "'two bench' is no number"),
        ("a photo of a benches", "'a benches' is no number"),
        ("a photo of eleven benches", "'eleven benches' is no number"),
        ("a photo of a mauve bench", "'a mauve bench' is no number"),
        ("a photo of bench", "'bench' is no number"),
        ("a photo of a cat and a dog and a cow", "more than two objects"),
        ("a photo of a cat left of a cat", "two of different names"),
        ("", "does not begin"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_named(prompt, reason):
    with pytest.raises(DatasetError, match="cannot be verified") as raised:
        parse(prompt)
    assert repr(prompt) in str(raised.value) and reason in str(raised.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: RequiredObject("unicorn"), "'unicorn' is none"),
        (lambda: RequiredObject("cat", 0), "count=0"),
        (lambda: RequiredObject("cat", 11), "count=11"),
        (lambda: RequiredObject("cat", colour="mauve"), "'mauve' is none"),
        (lambda: Requirement(()), "one object, or two"),
        (lambda: Requirement((RequiredObject("cat"),), "above"), "relation='above'"),
        (lambda: Requirement((RequiredObject("cat"), RequiredObject("dog")), "behind"), "relation='behind'"),
    ],
)
def test_what_cannot_be_required(make, reason):
    with pytest.raises(ConfigurationError, match=reason):
        make()
