# SPDX-License-Identifier: Apache-2.0
"""Whether settings are of the types that they are declared with: YAML and Python give whatever was written."""

from collections.abc import Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from trl_sipo.errors import ConfigurationError

# Type of a declaration: what it takes, in one place and in a list.
_NAMES = {
    int: ("a whole number", "one or several whole numbers"),
    float: ("a number", "several numbers"),
    str: ("a word or a text", "one or several texts"),
    bool: ("true or false", "several of true and false"),
    dict: ("settings by name", "several mappings"),
}


def check_types(config: Any, base: type, **others: Any) -> None:
    """Hold the fields that the subclasses of `base` declare against their declarations, and those of `others` too.

    Raises:
        ConfigurationError: a value of another type; names the field, the type and the value.
    """
    kinds = type(config).__mro__[: type(config).__mro__.index(base)]
    for declarations in (others, *(kind.__dict__.get("__annotations__", {}) for kind in kinds)):
        for name, declared in declarations.items():
            value = None if get_origin(declared) is ClassVar else getattr(config, name)
            if get_origin(declared) is not ClassVar and not _is_of(value, declared):
                raise ConfigurationError(f"`{name}` must be {_described(declared)}, got {value!r:.80}.")


def check_numbers(settings: Mapping[str, Any], kind: type, where: str) -> None:
    """Hold numbers and switches among settings of a dataclass against its declarations, those of libraries too.

    Args:
        settings: Not yet given to it.
        kind: The dataclass.
        where: What stands before a name in the message.

    Raises:
        ConfigurationError: a value of another type; names the field, the type and the value.
    """
    hints = get_type_hints(kind)
    for name, value in settings.items():
        declared = hints.get(name)
        parts = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
        if set(parts) <= {int, float, bool, NoneType} and not any(_is_of(value, part) for part in parts):
            wanted = " or ".join(_NAMES[part][0] for part in parts if part is not NoneType)
            raise ConfigurationError(f"`{where}{name}` must be {wanted}, got {value!r:.80}.")


def _is_of(value: Any, declared: Any) -> bool:
    if isinstance(declared, UnionType):
        return any(_is_of(value, kind) for kind in get_args(declared))
    if get_origin(declared) is list:
        return isinstance(value, list | tuple) and all(_is_of(part, get_args(declared)[0]) for part in value)
    if declared in (int, float):
        return isinstance(value, Integral if declared is int else Real) and not isinstance(value, bool)
    return isinstance(value, declared)


def _described(declared: Any) -> str:
    """In words; that a setting may be left out goes without saying."""
    if isinstance(declared, UnionType):
        return " or ".join(_described(kind) for kind in get_args(declared) if kind is not NoneType)
    if get_origin(declared) is list:
        return _NAMES[get_args(declared)[0]][1]
    return _NAMES[declared][0]
