# SPDX-License-Identifier: Apache-2.0
"""What a value that was read from JSON must be: checks that are put together as the value is, and name what is wrong.

JSON has no types to declare: a file that was torn, edited or made by someone else may hold anything. A check is given
a value and its name, and says in a clause which part of it is not as it must be; `None`: all is.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], str | None]

# Counts of steps, epochs, examples: transformers writes the largest of 64 bits for epochs without end.
LARGEST_COUNT = 2**63 - 1
_SHOWN = 40  # characters of a value


def count(high: int = LARGEST_COUNT) -> Check:
    """A whole number from 0 to `high`."""
    return _plain(lambda value: _is_whole(value) and 0 <= value <= high, f"a whole number from 0 to {high}")


def number(low: float = -math.inf, high: float = math.inf, *, is_finite: bool = True) -> Check:
    """A number from `low` to `high`; unless `is_finite`, NaN and infinity too."""
    what = "a finite number" if is_finite else "a number"
    if math.isfinite(low):
        what = f"{what} from {low:g} to {high:g}" if math.isfinite(high) else f"{what} of at least {low:g}"

    def is_right(value: Any) -> bool:
        if not (_is_whole(value) or isinstance(value, float)):
            return False
        return (abs(value) < math.inf and low <= value <= high) or not (is_finite or math.isfinite(value))

    return _plain(is_right, what)


def flag() -> Check:
    """True or false."""
    return _plain(lambda value: isinstance(value, bool), "true or false")


def text() -> Check:
    """A string."""
    return _plain(lambda value: isinstance(value, str), "a text")


def anything() -> Check:
    """Whatever there is."""
    return lambda value, name: None


def optional(check: Check) -> Check:
    """What `check` asks for, or null."""
    return lambda value, name: None if value is None else check(value, name)


def one_of(*checks: Check) -> Check:
    """What the first of the checks asks for, or one of the others."""

    def complaint(value: Any, name: str) -> str | None:
        found = [check(value, name) for check in checks]
        return None if None in found else found[0]

    return complaint


def items(check: Check, low: int = 0, high: float = math.inf) -> Check:
    """A list of `low` to `high` values, each of which is what `check` asks for."""
    length = f"of {low} values" if low == high else f"of at least {low}" if high == math.inf else f"of up to {high}"

    def complaint(value: Any, name: str) -> str | None:
        if not isinstance(value, list) or not low <= len(value) <= high:
            return _is_not(value, name, f"a list {length}" if low or high < math.inf else "a list")
        return _first(check(item, f"{name}[{position}]") for position, item in enumerate(value))

    return complaint


def row(*checks: Check) -> Check:
    """A list of as many values as there are checks, each of which is what its check asks for."""

    def complaint(value: Any, name: str) -> str | None:
        if not isinstance(value, list) or len(value) != len(checks):
            return _is_not(value, name, f"a list of {len(checks)} values")
        return _first(check(item, f"{name}[{i}]") for i, (check, item) in enumerate(zip(checks, value, strict=True)))

    return complaint


def table(check: Check, known: Mapping[str, Check] | None = None) -> Check:
    """An object of any names, each of whose values is what `check` asks for; those of `known` names, what these do."""
    of_name = known or {}

    def complaint(value: Any, name: str) -> str | None:
        if not isinstance(value, dict):
            return _is_not(value, name, "an object")
        return _first(of_name.get(key, check)(item, _inside(name, key)) for key, item in value.items())

    return complaint


def record(required: Mapping[str, Check], others: Mapping[str, Check] | None = None) -> Check:
    """An object of these names and no others, each of whose values is what its check asks for.

    Args:
        required: By name, those that must be there.
        others: Those that may be there.
    """
    known = {**required, **(others or {})}

    def complaint(value: Any, name: str) -> str | None:
        if not isinstance(value, dict):
            return _is_not(value, name, "an object")
        for key in required:
            if key not in value:
                return f"`{_inside(name, key)}` is missing"
        for key in value:
            if key not in known:
                return f"`{_inside(name, key)}` is not known"
        return _first(known[key](item, _inside(name, key)) for key, item in value.items())

    return complaint


def _plain(is_right: Callable[[Any], bool], what: str) -> Check:
    return lambda value, name: None if is_right(value) else _is_not(value, name, what)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _inside(name: str, key: str) -> str:
    key = key[:_SHOWN]
    return f"{name}.{key}" if name else key


def _is_not(value: Any, name: str, what: str) -> str:
    shown = json.dumps(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return f"`{name}` is {shown}, and not {what}" if name else f"it holds {shown}, and not {what}"


def _first(complaints: Any) -> str | None:
    return next((complaint for complaint in complaints if complaint is not None), None)
