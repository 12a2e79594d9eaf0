# SPDX-License-Identifier: Apache-2.0
"""What a prompt asks to be seen, as data and as text: objects, how many, in which colours, and where.

`describe` writes a requirement as a prompt of a fixed grammar, and `parse` reads it back:

    prompt  = "a photo of " phrase [(" and " | " left of " | " right of " | " above " | " below ") phrase]
    phrase  = ("a" | "an" | "two" | ... | "ten") [colour] object

The categories, the objects and the colours are those of GenEval (Ghosh, Hajishirzi, Schmidt, arXiv:2310.11513): six
kinds of prompts, the 80 classes of COCO, and ten colours.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

from trl_sipo.errors import ConfigurationError, DatasetError

#: The classes of COCO in its order, three of them as GenEval writes them ("computer mouse", not "mouse").
OBJECTS: Final = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
#: Of the first object to the second: each relation and what the second then is to the first.
OPPOSITE: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS: Final = tuple(OPPOSITE)
CATEGORIES: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
#: Nouns without a singular: they stand without an article, and nobody can say what two of them are.
PLURAL_ONLY: Final = ("skis", "scissors")

_ONE: Final = ("a", "an", "one")
_NUMBERS: Final = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MAX_COUNT: Final = 1 + len(_NUMBERS)
_IRREGULAR: Final = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}
_START: Final = "a photo of "
_JOINT: Final = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")


@dataclass(frozen=True)
class RequiredObject:
    """One kind of object that has to be seen.

    Attributes:
        name: One of `OBJECTS`.
        count: How many, 1 to 10.
        colour: One of `COLOURS`; None: any.
    """

    name: str
    count: int = 1
    colour: str | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTS:
            raise ConfigurationError(f"{self.name!r} is none of the objects that a prompt can require: {OBJECTS}.")
        if not 1 <= self.count <= MAX_COUNT:
            raise ConfigurationError(f"count={self.count} of {self.name!r} is not from 1 to {MAX_COUNT}.")
        if self.colour is not None and self.colour not in COLOURS:
            raise ConfigurationError(f"{self.colour!r} is none of the colours {COLOURS}.")


@dataclass(frozen=True)
class Requirement:
    """What a prompt asks to be seen.

    Attributes:
        objects: One or two, of different names.
        relation: Where the first of two objects is, seen from the second: one of `RELATIONS`; None: anywhere.
    """

    objects: tuple[RequiredObject, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        names = [required.name for required in self.objects]
        if len(names) not in (1, 2) or len(set(names)) != len(names):
            raise ConfigurationError(f"a requirement has one object, or two of different names; these are {names}.")
        if self.relation is not None and (self.relation not in RELATIONS or len(names) != 2):
            raise ConfigurationError(
                f"relation={self.relation!r} of {names}: it takes two objects, and one of {RELATIONS}."
            )

    @property
    def category(self) -> str:
        """Which of `CATEGORIES` it belongs to: a place goes before a number, and a number before a colour."""
        if self.relation is not None:
            return "position"
        if any(required.count > 1 for required in self.objects):
            return "counting"
        is_coloured = any(required.colour is not None for required in self.objects)
        if len(self.objects) == 2:
            return "color_attr" if is_coloured else "two_object"
        return "colors" if is_coloured else "single_object"


def plural(name: str) -> str:
    """The plural of one of `OBJECTS`."""
    if name in _IRREGULAR or name in PLURAL_ONLY:
        return _IRREGULAR.get(name, name)
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def with_article(noun: str) -> str:
    """A noun phrase in the singular after "a" or "an"; one without a singular as it is."""
    if noun.endswith(PLURAL_ONLY):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe(requirement: Requirement) -> str:
    """The prompt that asks for it, such as "a photo of a red apple and two green books"."""
    phrases = [_phrase(required) for required in requirement.objects]
    return _START + f" {requirement.relation or 'and'} ".join(phrases)


def parse(prompt: str) -> Requirement:
    """What a prompt of the grammar asks for; the inverse of `describe`.

    It also takes capitals, a full stop, "one", the wrong one of "a" and "an", and the plurals that GenEval's own
    prompts have ("benchs").

    Raises:
        DatasetError: the prompt is not of the grammar.
    """
    text = " ".join(prompt.lower().split()).removesuffix(".")
    if not text.startswith(_START):
        raise _unreadable(prompt, f"it does not begin with {_START.strip()!r}")
    first, *rest = _JOINT.split(text.removeprefix(_START))
    if len(rest) > 2:
        raise _unreadable(prompt, "it has more than two objects")
    joint, phrases = (rest[0], (first, rest[1])) if rest else ("and", (first,))
    objects = []
    for phrase in phrases:
        required = _read_phrase(phrase)
        if required is None:
            raise _unreadable(prompt, f"{phrase!r} is no number, colour and object that it knows")
        objects.append(required)
    try:
        return Requirement(tuple(objects), None if joint == "and" else joint)
    except ConfigurationError as error:
        raise _unreadable(prompt, str(error)) from error


def _unreadable(prompt: str, reason: str) -> DatasetError:
    return DatasetError(
        f"the prompt {prompt!r} cannot be verified: {reason}. Prompts are read by the grammar of "
        "trl_sipo.rewards.requirements, such as 'a photo of a red apple and a green book'."
    )


def _phrase(required: RequiredObject) -> str:
    colour = "" if required.colour is None else f"{required.colour} "
    if required.count == 1:
        return with_article(colour + required.name)
    return f"{_NUMBERS[required.count - 2]} {colour}{plural(required.name)}"


def _read_phrase(phrase: str) -> RequiredObject | None:
    number, _, noun = phrase.partition(" ")
    if phrase.endswith(PLURAL_ONLY) and number not in (*_ONE, *_NUMBERS):
        number, noun = "a", phrase
    if number in _NUMBERS:
        count, names = 2 + _NUMBERS.index(number), _names_by_plural()
    elif number in _ONE:
        count, names = 1, {name: name for name in OBJECTS}
    else:
        return None
    colour, _, coloured_noun = noun.partition(" ")
    if noun in names:  # first, for "orange" is a colour too
        return RequiredObject(names[noun], count)
    if colour in COLOURS and coloured_noun in names:
        return RequiredObject(names[coloured_noun], count, colour)
    return None


@cache
def _names_by_plural() -> dict[str, str]:
    """Each plural's object: the right one, and GenEval's ("benchs", "sheeps")."""

    def plurals() -> Iterator[tuple[str, str]]:
        for name in OBJECTS:
            yield name + ("es" if name.endswith("s") else "s"), name
            yield plural(name), name

    return dict(plurals())
