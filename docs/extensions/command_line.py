# SPDX-License-Identifier: Apache-2.0
"""The commands and their options as Markdown, from the parsers that the commands themselves use."""

import argparse
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from trl_sipo.cli.main import COMMANDS
from trl_sipo.trainer.methods import METHODS

Command = tuple[str, str, argparse.ArgumentParser]
"""Name after `trl-sipo`, one line of help, and the parser."""


def commands() -> Iterator[Command]:
    """Every command that takes options, those of `audit`, `data` and their like one by one."""
    for name, (module, help) in COMMANDS.items():
        yield from _of_module(name, help, import_module(module))


def _of_module(name: str, help: str, module: ModuleType) -> Iterator[Command]:
    if hasattr(module, "make_parser"):
        yield from _of_parser(name, help, _parser(name, module))
        return
    tables = [value for value in vars(module).values() if _is_table(value)]
    if not tables:
        raise LookupError(f"{module.__name__} has neither a `make_parser` nor a table of commands.")
    for word, (submodule, text) in tables[0].items():
        yield from _of_module(f"{name} {word}", text, import_module(submodule))


def _of_parser(name: str, help: str, parser: argparse.ArgumentParser) -> Iterator[Command]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield name, help, parser
        return
    texts = {choice.dest: choice.help or "" for choice in nested[0]._choices_actions}
    for word, subparser in nested[0].choices.items():
        yield from _of_parser(f"{name} {word}", texts.get(word, ""), subparser)


def _parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    parameters = list(inspect.signature(module.make_parser).parameters)
    return module.make_parser(name) if parameters[0] == "method" else module.make_parser(f"trl-sipo {name}")


def _is_table(value: Any) -> bool:
    """Whether a value is a table of commands: name -> (module, one line of help)."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(row, tuple) and len(row) == 2 and str(row[0]).startswith("trl_sipo.") for row in value.values()
        )
    )


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """What a parser takes, without `--help`, and without what is hidden."""
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    return [a for a in parser._actions if not isinstance(a, hidden) and a.help != argparse.SUPPRESS]


def markdown() -> str:
    """Every command with a table of its options, which is shown once where several have the same."""
    shown: dict[str, str] = {}
    sections = []
    for name, help, parser in commands():
        table, settings = _table(name, parser)
        first = shown.setdefault(table, name)
        if first != name:
            table = f"The options are those of [trl-sipo {first}](#trl-sipo-{first.replace(' ', '-')})."
        heading = f"## trl-sipo {name}\n\n{_sentence(help)}"
        described = "" if parser.description is None else _sentence(parser.description)
        sections += [heading, *([] if described == _sentence(help) else [described]), settings, table]
    return "\n\n".join(filter(None, sections)) + "\n"


def _sentence(text: str) -> str:
    text = text_of(text)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _table(name: str, parser: argparse.ArgumentParser) -> tuple[str, str]:
    """The options as a table, and a sentence about those that are settings of a trainer."""
    actions, settings = options(parser), ""
    if name in METHODS or name == "sipo-text":
        config = METHODS[name][0] if name in METHODS else "SIPOConfig"
        actions, settings = _without_settings(actions, config)
    rows = [f"| {_invocation(action)} | {_default(action)} | {_help(action, parser)} |" for action in actions]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows]) if rows else "No options.", settings


def _without_settings(actions: list[argparse.Action], config: str) -> tuple[list[argparse.Action], str]:
    """The options that are no settings of a trainer, and a sentence about those that are."""
    import trl_sipo

    settings = getattr(trl_sipo, config).__dataclass_fields__
    sentence = (
        f"Every setting of [`{config}`](settings.md) is an option too: `--learning_rate 1e-5`. `--config FILE` reads "
        "options from YAML; the command line wins. `--no_NAME` sets what is true by default to false."
    )
    return [action for action in actions if action.dest.removeprefix("no_") not in settings], sentence


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    # TRL's parser takes every name with dashes too.
    spelled = {string.replace("_", "-"): string for string in reversed(action.option_strings)}
    names = ", ".join(string for string in action.option_strings if string in spelled.values())
    return cell(f"`{names}{_value(action)}`")


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        words = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
        return " " + " ".join(words)
    if action.choices:
        return " {" + ",".join(map(str, action.choices)) + "}"
    return " " + action.dest.upper()


def _default(action: argparse.Action) -> str:
    if action.required:
        return "**required**"
    if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
        return ""
    shown = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else str(action.default)
    return cell(f"`{shown}`") if shown else ""


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    help = (action.help or "") % {**vars(action), "prog": parser.prog}
    # The default has a column.
    return text_of(re.sub(r"\s*\(default: [^()]*\)$|^default: .*$", "", help))


def cell(text: str) -> str:
    """Text for a table, in which a bar would end the cell."""
    return text.replace("|", "\\|")


def text_of(text: str) -> str:
    """Plain text, with code in backticks, as Markdown on one line that shows every character as it is."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    plain = [part if part.startswith("`") else re.sub(r"([\\*_<>\[\]])", r"\\\1", part) for part in parts]
    return cell("".join(plain))
