# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo data <what>`: preference data on its own, without a model. Only the command's module is imported."""

from importlib import import_module

from trl_sipo.errors import ConfigurationError

# Command -> (module with `run(command, argv)`, one line of help).
DATA_COMMANDS = {
    "check": ("trl_sipo.scripts.data_check", "look at every row: what is broken, repeated, contradictory or noisy"),
}


def usage() -> str:
    """The text of `trl-sipo data --help`."""
    width = max(map(len, DATA_COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in DATA_COMMANDS.items()]
    return "\n".join(
        [
            "usage: trl-sipo data <what> [options]",
            "",
            "Preference data on its own, without a model.",
            "",
            "commands:",
            *lines,
            "",
            "`trl-sipo data <what> --help` lists a command's options.",
        ]
    )


def run(command: str, argv: list[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        ConfigurationError: There is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] not in DATA_COMMANDS:
        raise ConfigurationError(f"Unknown command {argv[0]!r} of data; known are {', '.join(DATA_COMMANDS)}.")
    import_module(DATA_COMMANDS[argv[0]][0]).run(f"{command} {argv[0]}", argv[1:])
