# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed ZeRO-2 and ZeRO-3 on two CPU processes train, save and resume as one process does."""

import pytest

from tests.trainer import sharded_run
from tests.trainer.processes import run_ranks
from tests.trainer.sharded import METHODS, check_two_processes_are_one

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_are_one(stage, kind, tmp_path):
    two = check_two_processes_are_one(f"DeepSpeed ZeRO-{stage}", kind, tmp_path)
    assert two["shares"] == 1.0 if stage == 2 else two["shares"] < 0.6


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_not_shown_is_refused(stage, tmp_path):
    run_ranks(sharded_run.refuse_under_deepspeed, tmp_path, stage, directory=tmp_path)
