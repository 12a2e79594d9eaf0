# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit <what>`: look before training. Only the chosen audit's module is imported."""

from importlib import import_module

from trl_sipo.errors import ConfigurationError

# Audit -> (module with `run(command, argv)`, one line of help).
AUDITS = {
    "weights": ("trl_sipo.scripts.audit_weights", "which noise levels SIPO would mask for this model and these pairs"),
}


def usage() -> str:
    """The text of `trl-sipo audit --help`."""
    width = max(map(len, AUDITS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in AUDITS.items()]
    return "\n".join(
        [
            "usage: trl-sipo audit <what> [options]",
            "",
            "Look at model and data before training; nothing is trained.",
            "",
            "audits:",
            *lines,
            "",
            "`trl-sipo audit <what> --help` lists an audit's options.",
        ]
    )


def run(command: str, argv: list[str]) -> None:
    """Run the audit that the first argument names.

    Raises:
        ConfigurationError: There is no such audit.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] not in AUDITS:
        raise ConfigurationError(f"Unknown audit {argv[0]!r}; known are {', '.join(AUDITS)}.")
    import_module(AUDITS[argv[0]][0]).run(f"{command} {argv[0]}", argv[1:])
