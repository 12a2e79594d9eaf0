# SPDX-License-Identifier: Apache-2.0
"""Docstrings as this project writes them, for autodoc: Google's sections, with code and formulas as in Markdown.

- [`name`] becomes a link, when the module of the docstring knows the name and the reference describes it.
- `code` in single backticks is code, *words* between asterisks are stressed, and other characters mean themselves.
- A block that is indented after an empty line is shown as it stands: a formula.
- The arguments of a configuration are followed by type and default.
"""

import dataclasses
import inspect
import re
import sys
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util import logging
from sphinx.util.typing import ExtensionMetadata
from trl import DPOConfig

PACKAGE = "trl_sipo"
_log = logging.getLogger(__name__)
_CODE = re.compile(r"(\[)?(?<!`)`([^`]+)`(?!`)(?(1)\])")
_SECTION = re.compile(r"\s*(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note):$")
_ITEM = re.compile(r"\s*(- |\d+\. )")
_SECTIONS = Config()
_ARGUMENT = re.compile(r"    (\w+): ")
_STRESSED = re.compile(r"(?<![\w*\\])\*([^\W_](?:[\w -]*\w)?)\*(?![\w*])")


def to_rest(text: str, module: Any) -> str:
    """A docstring as reStructuredText, but for its sections, which napoleon reads.

    Args:
        module: The module that it stands in, in which names between [` and `] are looked up.
    """
    blocks, before = [], None
    for block in text.split("\n\n"):
        if before is not None and _is_formula(block, before):
            # A literal block of reStructuredText, at the place where the text before it stands.
            blocks += [_indent(before) * " " + "::", block]
        else:
            blocks.append(_inline(block, module))
            before = block
    return "\n\n".join(blocks)


def _indent(block: str) -> int:
    first = block.strip("\n").split("\n")[0]
    return len(first) - len(first.lstrip())


def _is_formula(block: str, before: str) -> bool:
    """Whether a block is indented deeper than the text before it, which is no list and opens no section."""
    opens = any(_SECTION.match(line) or _ITEM.match(line) for line in before.split("\n"))
    return bool(block.strip() and before.strip()) and not opens and _indent(block) >= _indent(before) + 4


def _inline(block: str, module: Any) -> str:
    """One block with its code and links, and every other character as itself."""
    parts, end = [], 0
    for match in _CODE.finditer(block):
        parts += [_literally(block[end : match.start()]), _code(match[2], bool(match[1]), module)]
        end = match.end()
    return "".join([*parts, _literally(block[end:])])


def _literally(text: str) -> str:
    parts = _STRESSED.split(text)  # every second one stood between asterisks
    escaped = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part) for part in parts]
    text = "".join(f"*{part}*" if index % 2 else part for index, part in enumerate(escaped))
    # "level: t." is no list that begins at t.
    return re.sub(r"^(\s*(?:\w+: )?[A-Za-z])\.(?=\s|$)", r"\1\\.", text, flags=re.M)


def _code(name: str, is_link: bool, module: Any) -> str:
    if not is_link:
        # Backslash and space: letters may follow, as in "`pair`s".
        return f"``{name}``\\ "
    target = target_of(name.removeprefix("~"), module)
    shown = name.removeprefix("~").rpartition(".")[2] if name.startswith("~") else name
    return f":py:obj:`{shown} <{target}>`\\ "


def target_of(name: str, module: Any) -> str:
    """The full name of what [`name`] means in a module: one of its own, one it knows, or a member of its classes.

    Raises:
        LookupError: Nothing is called so.
    """
    first, _, rest = name.partition(".")
    if hasattr(module, first):
        found = getattr(module, first)
        for part in filter(None, rest.split(".")):
            found = getattr(found, part)
        return full_name(found) or f"{module.__name__}.{name}"
    owners = [
        value for value in vars(module).values() if inspect.isclass(value) and value.__module__.startswith(PACKAGE)
    ]
    for owner in owners:
        if hasattr(owner, first):
            definer = next((base for base in owner.__mro__ if first in vars(base)), owner)
            return f"{full_name(definer)}.{first}"
    return _elsewhere(name)


def _elsewhere(name: str) -> str:
    """The full name of something that a module names without importing it: ours, an error, or a full path."""
    exported, errors = import_module(PACKAGE), import_module(f"{PACKAGE}.errors")
    if name in exported.__all__:
        return f"{PACKAGE}.{name}"
    if hasattr(errors, name):
        return f"{errors.__name__}.{name}"
    module, _, attribute = name.rpartition(".")
    if module and hasattr(import_module(module), attribute):
        return full_name(getattr(import_module(module), attribute)) or name
    raise LookupError(name)


def full_name(value: Any) -> str | None:
    """Where the reference describes a class, function or module; `None` for other values."""
    if inspect.ismodule(value):
        return value.__name__
    if not hasattr(value, "__qualname__"):
        return None
    if value.__qualname__ in import_module(PACKAGE).__all__ and value.__module__.startswith(PACKAGE):
        return f"{PACKAGE}.{value.__qualname__}"
    return f"{value.__module__}.{value.__qualname__}"


def describe_fields(text: str, config: type) -> str:
    """A configuration's docstring, whose arguments are followed by their types and defaults."""
    fields = {field.name: field for field in dataclasses.fields(config)}

    def describe(match: re.Match) -> str:
        field = fields.get(match[1])
        if field is None:
            return match[0]
        default = default_of(field)
        return f"    {match[1]} ({type_name(field)}, {f'default {default}' if default else 'required'}): "

    return re.sub(_ARGUMENT, describe, text)


def type_name(field: dataclasses.Field) -> str:
    """A field's type as it is written."""
    return field.type if isinstance(field.type, str) else inspect.formatannotation(field.type).replace("typing.", "")


def default_of(field: dataclasses.Field) -> str:
    """A field's default as it is written; empty if it has none."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "" if value is dataclasses.MISSING else f"`{value!r}`"


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn one docstring of ours into reStructuredText."""
    module = _module_of(name, obj)
    if module is None:
        return
    text = "\n".join(lines)
    if inspect.isclass(obj) and dataclasses.is_dataclass(obj):
        text = describe_fields(text, obj)
    try:
        lines[:] = to_rest(text, module).split("\n")
    except (LookupError, ImportError, AttributeError) as error:
        _log.warning("the docstring of %s links to [`%s`], which is nowhere", name, error, type="docstrings")
    if what not in ("attribute", "data"):  # of which napoleon would take all before a colon for a type
        lines[:] = GoogleDocstring(lines, _SECTIONS, app, what, name, obj, options).lines()


def _module_of(name: str, obj: Any) -> Any:
    """The module of ours that a docstring stands in; `None` for another package's."""
    if inspect.ismodule(obj):
        return obj
    if module := getattr(obj, "__module__", None) if hasattr(obj, "__qualname__") else None:
        return import_module(module) if module.startswith(PACKAGE) else None
    parts = name.split(".")  # of a constant or an attribute: that of its owner
    places = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next(sys.modules[place] for place in places if place in sys.modules)


def hide_signature(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, None] | None:
    """A configuration's hundred arguments are described one by one; its signature would fill the page."""
    return ("", None) if inspect.isclass(obj) and issubclass(obj, DPOConfig) else None


def without_link(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> Any:
    """A name that exists, but that the reference does not describe, is code without a link."""
    return content if node.get("refdomain") == "py" else None


def import_all(app: Sphinx) -> None:
    """Import what is described before Sphinx splits into processes, each of which would load PyTorch for itself."""
    package = import_module(PACKAGE)
    for name in package.__all__:
        getattr(package, name)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register with Sphinx."""
    app.connect("builder-inited", import_all)
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-process-signature", hide_signature)
    app.connect("missing-reference", without_link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
