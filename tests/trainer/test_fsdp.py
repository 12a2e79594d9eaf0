# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on two CPU processes trains, saves and resumes as one process does, policy and reference cut in two."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer import fsdp_run
from tests.trainer.processes import run_ranks
from tests.trainer.runs import largest_difference, predict
from trl_sipo.trainer.sharding import repeated_blocks

CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}
CASES = {"lora": "sipo", "full": "dpo"}


def _run(function, output, *arguments):
    run_ranks(function, output, *arguments, directory=output)
    return torch.load(output / "result.pt", weights_only=False)


def _loaded(kind, folder):
    """The pipeline that users load, with plain diffusers."""
    if kind == "full":
        return StableDiffusionPipeline.from_pretrained(folder)
    pipeline = tiny_stable_diffusion()
    pipeline.load_lora_weights(folder)
    return pipeline


@pytest.mark.parametrize("kind", CASES)
def test_two_processes_that_share_the_weights_are_one(kind, tmp_path):
    # AdamW, so that there is a state to resume with; a small epsilon would turn rounding into steps of full size.
    options = {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 1e-3, **CHECKPOINTS}
    fsdp_run.train(tmp_path / "one", CASES[kind], kind, 8, options)
    one = torch.load(tmp_path / "one" / "result.pt", weights_only=False)
    two = _run(fsdp_run.train, tmp_path / "two", CASES[kind], kind, 4, options)

    assert "FSDP2 on 2 processes (cpu)" in two["described"]
    assert one["shares"] == 1.0 and two["shares"] < 0.55
    assert two["reference_shares"] is None if kind == "lora" else two["reference_shares"] < 0.55
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
    for key, value in one["metrics"].items():
        if "rewards" in key or "loss" in key or "sipo" in key:
            assert two["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key

    # What was saved is the trained model, for plain diffusers; that of a checkpoint is that of its step.
    for folder in (".", "checkpoint-2", "checkpoint-4"):
        saved, same = (predict(_loaded(kind, tmp_path / name / folder)) for name in ("one", "two"))
        learnt = (saved - predict(tiny_stable_diffusion())).abs().max()
        assert (saved - same).abs().max() < 1e-3 * learnt

    resumed = _run(fsdp_run.resume, tmp_path / "two", CASES[kind], kind, 4, options)
    assert largest_difference(two["weights"], resumed["weights"]) < 1e-7
    assert resumed["loss"] == pytest.approx(two["loss"], abs=1e-6)


def test_what_is_not_shown_is_refused(tmp_path):
    run_ranks(fsdp_run.refuse, tmp_path, directory=tmp_path)


def test_units_are_the_repeated_blocks_that_the_model_has():
    assert repeated_blocks(tiny_stable_diffusion().unet) == [
        "BasicTransformerBlock",
        "CrossAttnUpBlock2D",
        "ResnetBlock2D",
        "UpBlock2D",
    ]
