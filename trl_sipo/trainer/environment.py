# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a run depend on beside its settings: versions and devices, without names of hosts and users."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def processor_name() -> str:
    """The name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
