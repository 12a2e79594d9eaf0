# SPDX-License-Identifier: Apache-2.0
"""The examples of the documentation train as the trainers' own tests do: one thread, no network."""

import importlib
import sys

import pytest

from tests.docs.pages import ROOT
from tests.trainer.conftest import _modules_out_of_the_collectors_way, _one_quiet_thread

__all__ = ["_modules_out_of_the_collectors_way", "_one_quiet_thread"]


@pytest.fixture(scope="session")
def extension():
    """Loads a module of docs/extensions by its name."""
    folder = str(ROOT / "docs" / "extensions")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
