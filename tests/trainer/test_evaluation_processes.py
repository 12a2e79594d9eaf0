# SPDX-License-Identifier: Apache-2.0
"""Two processes evaluate each pair once, where the pairs do not divide among them, and predict each once."""

import pytest
import torch

from tests.trainer import evaluation_run
from tests.trainer.processes import run_ranks


@pytest.mark.parametrize("of_what", [evaluation_run.evaluate_rows, evaluation_run.evaluate_stream])
def test_each_pair_counts_once(of_what, tmp_path):
    of_what(tmp_path)
    one = torch.load(tmp_path / "result-0.pt", weights_only=False)
    run_ranks(of_what, tmp_path, directory=tmp_path, timeout=60)
    for process in (0, 1):
        two = torch.load(tmp_path / f"result-{process}.pt", weights_only=False)
        assert two["metrics"]["eval_rows"] == two["predicted"]["test_rows"] == 7
        assert two["predictions"].shape == (7, 2)
        for key in ("eval_loss", "eval_logps/chosen", "eval_rewards/chosen", "eval_mean_reward"):
            assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-4, abs=1e-3), key
