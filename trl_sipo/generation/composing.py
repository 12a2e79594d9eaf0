# SPDX-License-Identifier: Apache-2.0
"""Composes prompts whose truth can be checked, in the structure of GenEval: objects, counts, colours and places.

Every composed prompt can be read back (`trl_sipo.rewards.requirements.parse`), so that a verifier knows what was asked
for. They are drawn by a generator of our own: they are not GenEval's prompts.
"""

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, Final

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.requirements import (
    CATEGORIES,
    COLOURS,
    OBJECTS,
    OPPOSITE,
    PLURAL_ONLY,
    RELATIONS,
    RequiredObject,
    Requirement,
)

#: How many prompts of each category GenEval has, 553 in all.
NUMBERS: Final = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
#: How many of an object a prompt asks for.
COUNTS: Final = (2, 3, 4)
#: As in GenEval, nobody is asked to be of a colour.
UNCOLOURED: Final = ("person",)


@dataclass(frozen=True)
class _Space:
    """All requirements of a category, as the product of some axes: they are counted and drawn, and never listed.

    Args:
        axes: From the objects there are, what is chosen from.
        make: From one choice of each axis to a requirement.
    """

    axes: Callable[[Sequence[str]], tuple[Sequence[Any], ...]]
    make: Callable[..., Requirement]


def _pairs(objects: Sequence[str]) -> list[tuple[str, str]]:
    return list(combinations(objects, 2))


def _coloured(objects: Sequence[str]) -> list[str]:
    return [name for name in objects if name not in UNCOLOURED]


def _countable(objects: Sequence[str]) -> list[str]:
    return [name for name in objects if name not in PLURAL_ONLY]


def _two(
    names: tuple[str, str], colours: tuple[str | None, str | None] = (None, None), relation: str | None = None
) -> Requirement:
    first, second = (RequiredObject(name, colour=colour) for name, colour in zip(names, colours, strict=True))
    return Requirement((first, second), relation)


# Pairs are unordered, so that "a dog and a cat" and "a cat and a dog" are not both drawn; `_turned` orders them.
_SPACES: Final = {
    "single_object": _Space(lambda objects: (objects,), lambda name: Requirement((RequiredObject(name),))),
    "two_object": _Space(lambda objects: (_pairs(objects),), _two),
    "counting": _Space(
        lambda objects: (_countable(objects), COUNTS), lambda name, count: Requirement((RequiredObject(name, count),))
    ),
    "colors": _Space(
        lambda objects: (_coloured(objects), COLOURS),
        lambda name, colour: Requirement((RequiredObject(name, colour=colour),)),
    ),
    "position": _Space(
        lambda objects: (_pairs(objects), RELATIONS), lambda names, relation: _two(names, relation=relation)
    ),
    "color_attr": _Space(lambda objects: (_pairs(_coloured(objects)), list(permutations(COLOURS, 2))), _two),
}


def compose(
    numbers: Mapping[str, int] | int | None = None,
    *,
    seed: int = 0,
    objects: Sequence[str] = OBJECTS,
    only_objects: Collection[str] | None = None,
    exclude_objects: Collection[str] = (),
) -> list[Requirement]:
    """Draw requirements, none of them twice, category by category.

    Args:
        numbers: How many of each category; or of all, in GenEval's proportions; None: GenEval's numbers. A category
            that has not so many is exhausted, unless it is named; of a number of all, others then make up for it.
        seed: Equal seeds and objects give equal requirements.
        objects: Of which they are made, of `trl_sipo.rewards.requirements.OBJECTS`.
        only_objects: Of these alone.
        exclude_objects: Without these, such as those held out for testing.

    Raises:
        ConfigurationError: An unknown object or category, or more requirements than there are.
    """
    chosen = _chosen_objects(objects, only_objects, exclude_objects)
    axes = {category: space.axes(chosen) for category, space in _SPACES.items()}
    sizes = {category: math.prod(map(len, parts)) for category, parts in axes.items()}
    requirements = []
    for category, number in _numbers(numbers, sizes).items():
        generator = random.Random(f"{seed}:{category}")
        for index in generator.sample(range(sizes[category]), number):
            requirement = _SPACES[category].make(*_choice(axes[category], index))
            requirements.append(_turned(requirement) if generator.random() < 0.5 else requirement)
    return requirements


def split_objects(
    objects: Sequence[str] = OBJECTS, *, test_share: float = 0.5, seed: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Objects to train with and objects to test with, which share none; both in the order of `objects`.

    Raises:
        ConfigurationError: `test_share` leaves one of them without two objects.
    """
    number = round(test_share * len(objects))
    if not 2 <= number <= len(objects) - 2:
        raise ConfigurationError(
            f"test_share={test_share} of {len(objects)} objects leaves fewer than two to train or to test with."
        )
    held_out = set(random.Random(f"{seed}:objects").sample(list(objects), number))
    train = tuple(name for name in objects if name not in held_out)
    return train, tuple(name for name in objects if name in held_out)


def _chosen_objects(objects: Sequence[str], only: Collection[str] | None, exclude: Collection[str]) -> list[str]:
    unknown = sorted({*objects, *(only or ()), *exclude} - set(OBJECTS))
    if unknown:
        raise ConfigurationError(f"there is no object {unknown[0]!r} to compose prompts of; known are {OBJECTS}.")
    return [name for name in dict.fromkeys(objects) if (only is None or name in only) and name not in exclude]


def _numbers(numbers: Mapping[str, int] | int | None, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many of each category to draw."""
    if numbers is None:
        return {category: min(number, sizes[category]) for category, number in NUMBERS.items()}
    if isinstance(numbers, int):
        return _apportioned(numbers, sizes)
    for category, number in numbers.items():
        if category not in CATEGORIES:
            raise ConfigurationError(f"there is no category {category!r}; there are {', '.join(CATEGORIES)}.")
        if not 0 <= number <= sizes[category]:
            raise ConfigurationError(
                f"{number} prompts of {category!r} were asked for; of these objects there are 0 to {sizes[category]}."
            )
    return dict(numbers)


def _apportioned(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """A total in GenEval's proportions, by the method of Sainte-Laguë: each prompt goes where it lacks most."""
    if not 1 <= total <= sum(sizes.values()):
        raise ConfigurationError(
            f"{total} prompts were asked for; of these objects 1 to {sum(sizes.values())} can be composed."
        )
    shares = dict.fromkeys(NUMBERS, 0)
    for _ in range(total):
        free = (category for category in NUMBERS if shares[category] < sizes[category])
        shares[max(free, key=lambda category: NUMBERS[category] / (2 * shares[category] + 1))] += 1
    return shares


def _choice(axes: Sequence[Sequence[Any]], index: int) -> list[Any]:
    """The element of the product of `axes` that has this number."""
    choice = []
    for axis in reversed(axes):
        index, place = divmod(index, len(axis))
        choice.append(axis[place])
    return choice[::-1]


def _turned(requirement: Requirement) -> Requirement:
    """The same, said from the other side: a dog left of a cat is a cat right of a dog."""
    relation = None if requirement.relation is None else OPPOSITE[requirement.relation]
    return Requirement(requirement.objects[::-1], relation)
