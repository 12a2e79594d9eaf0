# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit <what>`: look before training. Only the chosen audit's module is imported."""

from trl_sipo.scripts.subcommands import run_named, usage_of

# Audit -> (module with `run(command, argv)`, one line of help).
AUDITS = {
    "weights": ("trl_sipo.scripts.audit_weights", "which noise levels SIPO would mask for this model and these pairs"),
    "beta": ("trl_sipo.scripts.audit_beta", "how strong a beta is for this model and these pairs, and a range"),
    "data": ("trl_sipo.scripts.audit_data", "what is wrong with the pairs, and how a model and rewards see them"),
    "cost": ("trl_sipo.scripts.audit_cost", "memory, time and disk of a run, for this machine and for named GPUs"),
}


def usage() -> str:
    """The text of `trl-sipo audit --help`."""
    purpose = "Look at model and data before training; nothing is trained."
    hint = "`trl-sipo audit <what> --help` lists an audit's options."
    return usage_of("trl-sipo audit <what>", purpose, AUDITS, hint, heading="audits")


def run(command: str, argv: list[str]) -> None:
    """Run the audit that the first argument names.

    Raises:
        ConfigurationError: There is no such audit.
    """
    run_named(command, argv, AUDITS, usage(), unknown="Unknown audit {}")
