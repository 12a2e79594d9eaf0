# SPDX-License-Identifier: Apache-2.0
"""The reference point of Diffusion-KTO is that of all processes: two with four images each train as one with eight."""

import pytest
import torch

from tests.trainer.kto_distributed_run import train
from tests.trainer.processes import run_ranks
from tests.trainer.runs import largest_difference


@pytest.mark.slow
def test_two_processes_have_one_reference_point(tmp_path):
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", 8)
    run_ranks(train, tmp_path / "two", 4, directory=tmp_path / "two")
    one, two = (torch.load(tmp_path / name / "result.pt", weights_only=False) for name in ("one", "two"))
    assert max(one["logs"]["kl"]) > 1e-3  # else any mean would do
    assert two["logs"]["kl"] == pytest.approx(one["logs"]["kl"], rel=1e-3, abs=1e-6)
    for name in ("loss", "rewards/margins", "rewards/chosen"):
        assert two["logs"][name] == pytest.approx(one["logs"][name], rel=1e-3, abs=1e-4), name
    assert largest_difference(one["weights"], two["weights"]) < 1e-4
    for name in ("eval_loss", "eval_kl", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=2e-3, abs=1e-4), name
