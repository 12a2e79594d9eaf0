# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on two CPU processes trains, saves and resumes as one process does, policy and reference cut in two."""

import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer import sharded_run
from tests.trainer.processes import run_ranks
from tests.trainer.runs import largest_difference
from tests.trainer.sharded import METHODS, check_two_processes_are_one
from trl_sipo.adapters.wrappers import repeated_blocks


@pytest.mark.parametrize("kind", ["lora", "full", pytest.param("trained_lora", marks=pytest.mark.slow)])
def test_two_processes_that_share_the_weights_are_one(kind, tmp_path):
    two = check_two_processes_are_one("FSDP2", kind, tmp_path)
    assert two["shares"] < 0.55
    assert two["reference_shares"] is None if kind != "full" else two["reference_shares"] < 0.55


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_bf16_is_as_near_to_float32_as_without_sharding(kind, tmp_path):
    weights = {}
    for name, engine, options in (
        ("float32", "one process", {}),
        ("bf16", "one process", {"bf16": True}),
        ("sharded", "FSDP2", {"bf16": True}),
    ):
        arguments = (engine, "dpo", kind, 4 if engine == "FSDP2" else 8, {"beta": 100.0, **options})
        if engine == "FSDP2":
            run_ranks(sharded_run.train, tmp_path / name, *arguments, directory=tmp_path / name)
        else:
            sharded_run.train(tmp_path / name, *arguments)
        weights[name] = torch.load(tmp_path / name / "result.pt", weights_only=False)["weights"]
    assert {weight.dtype for weight in weights["sharded"].values()} == {torch.float32}
    plain, sharded = (largest_difference(weights["float32"], weights[name]) for name in ("bf16", "sharded"))
    assert 0 < sharded < 2 * plain


def test_what_is_not_shown_is_refused(tmp_path):
    run_ranks(sharded_run.refuse, tmp_path, directory=tmp_path)


def test_units_are_the_repeated_blocks_that_the_model_has():
    assert repeated_blocks(tiny_stable_diffusion().unet) == [
        "BasicTransformerBlock",
        "CrossAttnUpBlock2D",
        "ResnetBlock2D",
        "UpBlock2D",
    ]
