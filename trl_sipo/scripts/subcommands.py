# SPDX-License-Identifier: Apache-2.0
"""Tables of commands: their help, and running the one that is named. Only that one's module is imported."""

from collections.abc import Mapping
from importlib import import_module

from trl_sipo.errors import ConfigurationError

Commands = Mapping[str, tuple[str, str]]
"""Command -> (module with `run(command, argv)`, one line of help)."""


def usage_of(program: str, purpose: str, commands: Commands, hint: str, heading: str = "commands") -> str:
    """The text of `--help`.

    Args:
        program: What is typed, up to the options, such as "trl-sipo <command>".
        purpose: One sentence.
        hint: The last line.
        heading: Of the table.
    """
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in commands.items()]
    return "\n".join([f"usage: {program} [options]", "", purpose, "", f"{heading}:", *lines, "", hint])


def run_named(command: str, argv: list[str], commands: Commands, usage: str, unknown: str) -> None:
    """Run the command that the first argument names, or print the help.

    Args:
        unknown: How the error on another name begins; `{}` is the name.

    Raises:
        ConfigurationError: There is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return
    if argv[0] not in commands:
        raise ConfigurationError(f"{unknown.format(repr(argv[0]))}; known are {', '.join(commands)}.")
    import_module(commands[argv[0]][0]).run(f"{command} {argv[0]}", argv[1:])
