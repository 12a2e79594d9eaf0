# SPDX-License-Identifier: Apache-2.0
"""What breaks in one of two processes is skipped, or ends the run, in both."""

import pytest

from tests.trainer import nonfinite_run
from tests.trainer.processes import run_ranks


@pytest.mark.parametrize("link", nonfinite_run.BREAKS)
@pytest.mark.parametrize("what", ["skip", "fail"])
def test_both_processes_agree(what, link, tmp_path):
    run_ranks(getattr(nonfinite_run, what), str(tmp_path / "run"), link, directory=tmp_path, timeout=120)


def test_no_process_ends_before_what_broke_is_written(tmp_path):
    run_ranks(nonfinite_run.fail_on_a_slow_disk, str(tmp_path / "run"), directory=tmp_path, timeout=120)
