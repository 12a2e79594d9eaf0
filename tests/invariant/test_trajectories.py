# SPDX-License-Identifier: Apache-2.0
"""The kept training runs come out as they did; see `trajectories.py` for what they are and how to renew them."""

import json

import pytest

from tests.invariant.trajectories import CASES, GOLDEN, KEYS, STEPS, trajectory
from tests.trainer.conftest import _modules_out_of_the_collectors_way, _one_quiet_thread

__all__ = ["_modules_out_of_the_collectors_way", "_one_quiet_thread"]


@pytest.mark.parametrize("case", CASES)
def test_the_trajectory_is_the_one_that_was_kept(case, tmp_path):
    golden, actual = json.loads(GOLDEN.read_text())[case], trajectory(case, str(tmp_path))
    assert actual.keys() == golden.keys() == set(KEYS)
    for key, values in golden.items():
        # A margin is a difference of nearly equal errors times beta, and carries their rounding on other processors.
        tolerance = 1e-3 if key == "rewards/margins" else 1e-4
        assert len(values) == STEPS and actual[key] == pytest.approx(values, rel=1e-4, abs=tolerance), key


def test_the_kept_runs_are_not_all_alike():
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == CASES.keys()
    assert len({tuple(run["loss"]) for run in golden.values()}) == len(CASES)
    assert all(run["rewards/margins"][-1] != 0 for run in golden.values())
