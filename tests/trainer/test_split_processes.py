# SPDX-License-Identifier: Apache-2.0
"""Two processes that take the arms of their pairs one after the other train what both arms together do.

The chosen arm's activations are computed again in the backward pass, through the wrapper of DDP: its exchange of
gradients must neither begin anew nor miss what the second arm adds.
"""

import pytest
import torch

from tests.trainer.distributed_run import train
from tests.trainer.processes import run_ranks
from tests.trainer.runs import largest_difference

SPLIT = {"split_pair_backward": True, "beta": 100.0, "learning_rate": 0.5}
JOINT = {"beta": 100.0, "learning_rate": 0.5}
# Without activation checkpointing DDP also looks for weights that an arm leaves without a gradient.
CASES = {
    "lora": ("sipo", "new_lora", 4, {}),
    "full, accumulated, without checkpointing": (
        *("dpo_cm", "full", 2),
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": False, "sft_weight": 0.1},
    ),
}


@pytest.mark.parametrize("case", [pytest.param("lora", marks=pytest.mark.slow), *list(CASES)[1:]])
def test_split_arms_on_two_processes_are_joint_arms_on_one_and_two(case, tmp_path):
    method, kind, batch_size, options = CASES[case]
    of_one = {name: value for name, value in options.items() if name != "gradient_accumulation_steps"}
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", method, kind, 8, {**of_one, **JOINT})
    for name, way in (("joint", JOINT), ("split", SPLIT)):
        directory = tmp_path / name
        run_ranks(train, directory, method, kind, batch_size, {**options, **way}, directory=directory)
    one, joint, split = (
        torch.load(tmp_path / name / "result.pt", weights_only=False) for name in ("one", "joint", "split")
    )
    assert split["processes"] == 2 and one["loss"][0] != one["loss"][-1]
    for other in (one, joint):
        assert largest_difference(other["weights"], split["weights"]) < 1e-5
        assert largest_difference(other["gradient"], split["gradient"]) < 2e-4
        assert split["loss"] == pytest.approx(other["loss"], abs=1e-5) and split["masked"] == other["masked"]
