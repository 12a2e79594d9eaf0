# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo study <what>`: a blind comparison of models by people. Only the chosen command's module is imported."""

from trl_sipo.scripts.subcommands import run_named, usage_of

# Command -> (module with `run(command, argv)`, one line of help).
STUDY_COMMANDS = {
    "build": ("trl_sipo.scripts.study_build", "make a study of the samples of two or more models"),
    "serve": ("trl_sipo.scripts.study_serve", "the pages on which raters answer"),
    "report": ("trl_sipo.scripts.study_report", "who wins, how sure that is, and how far raters agree"),
    "export": ("trl_sipo.scripts.study_export", "all answers as CSV or JSON Lines"),
    "import": ("trl_sipo.scripts.study_import", "the result as preference pairs, to train on"),
    "invite": ("trl_sipo.scripts.study_invite", "add a rater, or give one a new token"),
}


def usage() -> str:
    """The text of `trl-sipo study --help`."""
    purpose = "A blind comparison of models by people, after appendix E of the SIPO paper."
    hint = "`trl-sipo study <what> --help` lists a command's options."
    return usage_of("trl-sipo study <what>", purpose, STUDY_COMMANDS, hint)


def run(command: str, argv: list[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        ConfigurationError: There is no such command.
    """
    run_named(command, argv, STUDY_COMMANDS, usage(), unknown="Unknown command {} of study")
