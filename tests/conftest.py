# SPDX-License-Identifier: Apache-2.0
"""Properties are held against the same values in every run, nothing is kept from one to the next; a browser."""

import tempfile

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from tests.browsers import chromium, find_chromium

set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis"))
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def browser():
    """Chromium without a screen; where it is not installed, the test is skipped, and says so."""
    if find_chromium() is None:
        pytest.skip("needs Chromium: install Debian's package `chromium`, or name another in TRL_SIPO_CHROMIUM")
    with chromium() as running:
        yield running
