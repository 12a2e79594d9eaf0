# SPDX-License-Identifier: Apache-2.0
"""The benchmarks train as the trainers' own tests do: one thread, no network."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.trainer.conftest import _modules_out_of_the_collectors_way, _one_quiet_thread

__all__ = ["_modules_out_of_the_collectors_way", "_one_quiet_thread", "paper", "script"]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a benchmark by its name; its modules find each other as those of a running script do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for file in BENCHMARKS.glob("*.py"):
            sys.modules.pop(file.stem, None)


@pytest.fixture(scope="module")
def paper() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of `benchmarks/paper` by its name, as a question that is run there finds it."""
    folders, known = [str(BENCHMARKS / "paper"), str(BENCHMARKS)], set(sys.modules)
    sys.path[:0] = folders
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in folders]
        own = {file.stem for folder in folders for file in Path(folder).glob("*.py")}
        for name in own & (set(sys.modules) - known):
            sys.modules.pop(name)
