# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo env`: versions and devices, for a bug report."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from trl_sipo.printing import ArgumentParser

PACKAGES = (
    "trl-sipo", "trl", "transformers", "diffusers", "accelerate", "peft", "datasets", "torch", "bitsandbytes", "numpy",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Name to version of everything a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


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
