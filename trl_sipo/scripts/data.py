# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo data <what>`: preference data on its own, without a model. Only the command's module is imported."""

from trl_sipo.scripts.subcommands import run_named, usage_of

# Command -> (module with `run(command, argv)`, one line of help).
DATA_COMMANDS = {
    "check": ("trl_sipo.scripts.data_check", "look at every row: what is broken, repeated, contradictory or noisy"),
}


def usage() -> str:
    """The text of `trl-sipo data --help`."""
    purpose = "Preference data on its own, without a model."
    return usage_of(
        "trl-sipo data <what>", purpose, DATA_COMMANDS, "`trl-sipo data <what> --help` lists a command's options."
    )


def run(command: str, argv: list[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        ConfigurationError: There is no such command.
    """
    run_named(command, argv, DATA_COMMANDS, usage(), unknown="Unknown command {} of data")
