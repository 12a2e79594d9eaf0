# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks have in common: ratios and their targets, the options that every one has, and the JSON file."""

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trl_sipo.scripts.env import environment


@dataclass(frozen=True)
class Ratio:
    """A ratio of two measurements of one run.

    Attributes:
        ratio: The value.
        target: Its limit; `None` where there is none.
        below: Whether the limit is an upper one.
    """

    ratio: float
    target: float | None = None
    below: bool = True

    @property
    def verdict(self) -> str:
        """The target, and whether it is met; empty without one."""
        if self.target is None:
            return ""
        is_met = self.ratio <= self.target if self.below else self.ratio >= self.target
        return f"target {'<=' if self.below else '>='} {self.target:g}: {'met' if is_met else 'MISSED'}"


def add_common_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Device, threads and the file that is written."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--output", type=Path, default=Path(output), help="default: %(default)s")


def print_ratios(ratios: dict[str, Ratio]) -> None:
    """One line each, with the verdict."""
    print("ratios")
    for name, entry in ratios.items():
        print(f"  {name:<54}{entry.ratio:7.3f}  {entry.verdict}".rstrip())


def write_record(options: argparse.Namespace, ratios: dict[str, Ratio], **content: Any) -> dict[str, Any]:
    """Write the options, the content, the ratios and the environment to `options.output`; returns what was written."""
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        **content,
        "ratios": {name: {**asdict(entry), "verdict": entry.verdict} for name, entry in ratios.items()},
        "environment": {
            **environment(),
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_1min": os.getloadavg()[0],
            "gpu": gpu,
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def processor_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system
