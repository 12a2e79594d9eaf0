# SPDX-License-Identifier: Apache-2.0
"""What pages of the reference leave to the code: `<!-- generate: WHAT NAME -->` is replaced as a page is read.

- `package trl_sipo.core`: every public module of a package with its public classes, functions and constants;
- `module trl_sipo.errors`: one of them;
- `class trl_sipo.trainer.safety_config.SafetyConfig`: one class;
- `exports Trainer`: the names of `trl_sipo.__all__` that end so; `exports Other`: those that no page has else;
- `inherited trl_sipo.DiffusionDPOConfig`: the settings that it has of TRL and transformers, and those it refuses;
- `commands`: every command with its options.
"""

import dataclasses
import pkgutil
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import command_line
from docstrings import default_of
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

EXPORTED_KINDS = ("Config", "Trainer")
_COMMENT = re.compile(r"^<!-- generate: (\w+) ?([\w.]*) -->$", re.M)


def package(name: str) -> str:
    """Every public module under a package, itself included where it defines something."""
    found = import_module(name)
    names = [name, *(part.name for part in pkgutil.walk_packages(found.__path__, f"{name}."))]
    return "\n".join(module(part) for part in names if not any(word.startswith("_") for word in part.split(".")))


def module(name: str) -> str:
    """A module under a heading of its own."""
    return f"## {name}\n\n" + _rest(f".. automodule:: {name}", "members:", "member-order: bysource")


def one_class(name: str) -> str:
    """A class with what it adds to those it builds on, which are named."""
    options = ("members:", "show-inheritance:", "exclude-members: rejected_fields", "member-order: bysource")
    return f"## {name.rpartition('.')[2]}\n\n" + _rest(f".. autoclass:: {name}", *options)


def exports(kind: str) -> str:
    """Classes or functions that `trl_sipo` offers, of one kind."""
    names = [name for name in import_module("trl_sipo").__all__ if name != "__version__"]
    if kind in EXPORTED_KINDS:
        return "\n".join(one_class(f"trl_sipo.{name}") for name in names if name.endswith(kind))
    others = [name for name in names if not name.endswith(EXPORTED_KINDS)]
    return "\n".join(f"## {name}\n\n" + _rest(f".. autofunction:: trl_sipo.{name}") for name in others)


def inherited(name: str) -> str:
    """Two tables: the settings of TRL and transformers that a configuration has, and those that it refuses."""
    config = _named(name)
    ours = {
        n
        for base in config.__mro__
        if base.__module__.startswith("trl_sipo.")
        for n in vars(base).get("__annotations__", {})
    }
    fields = [field for field in dataclasses.fields(config) if field.name not in ours]
    taken = [field for field in fields if field.name not in config.rejected_fields]
    lines = ["| setting | default | |", "|---|---|---|"]
    lines += [f"| `{f.name}` | {command_line.cell(default_of(f))} | {_first_sentence(f)} |" for f in taken]
    refused = ["| refused | why |", "|---|---|"]
    refused += [f"| `{n}` | {command_line.text_of(why)} |" for n, why in sorted(config.rejected_fields.items())]
    return "\n".join([*lines, "", *refused, ""])


def _first_sentence(field: dataclasses.Field) -> str:
    help = " ".join(str(field.metadata.get("help") or "").split())
    return command_line.text_of(re.split(r"(?<=[a-z`)\"'])\. ", help)[0])


def _named(name: str) -> Any:
    place, _, last = name.rpartition(".")
    return getattr(import_module(place), last)


def _rest(directive: str, *options: str) -> str:
    lines = ["```{eval-rst}", directive, *(f"   :{option}" for option in options), "```", ""]
    return "\n".join(lines)


GENERATORS: dict[str, Callable[[str], str]] = {
    "package": package,
    "module": module,
    "class": one_class,
    "exports": exports,
    "inherited": inherited,
    "commands": lambda name: command_line.markdown(),
}


def generate(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the comments of a page."""
    source[0] = _COMMENT.sub(lambda match: GENERATORS[match[1]](match[2]), source[0])


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register with Sphinx."""
    app.connect("source-read", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
