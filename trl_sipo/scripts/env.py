# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo env`: versions and devices, for a bug report."""

import argparse

from trl_sipo.printing import ArgumentParser
from trl_sipo.trainer.environment import environment


def make_parser(prog: str = "trl-sipo env") -> argparse.ArgumentParser:
    """The command's parser; it has no options."""
    return ArgumentParser(prog=prog, description="Print versions and devices, for a bug report.")


def run(command: str, argv: list[str]) -> None:
    """Print the environment."""
    make_parser().parse_args(argv)
    import torch

    rows = environment()
    rows["accelerator"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    for name, value in rows.items():
        print(f"- {name}: {value}")
