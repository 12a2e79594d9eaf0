# SPDX-License-Identifier: Apache-2.0
"""Properties are held against the same values in every run, and nothing is kept from one run to the next."""

import tempfile

import hypothesis
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis"))
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")
