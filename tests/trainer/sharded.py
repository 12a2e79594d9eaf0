# SPDX-License-Identifier: Apache-2.0
"""A run in two processes that share its weights is that of one process: for `test_fsdp.py` and `test_deepspeed.py`."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer import sharded_run
from tests.trainer.processes import run_ranks
from tests.trainer.runs import largest_difference, predict

# AdamW, so that there is a state to resume with; a small epsilon would turn rounding into steps of full size.
OPTIONS = {
    "optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip
# What is trained, and with it the reference: LoRA off, a frozen model, a frozen copy of the LoRA. With which method.
METHODS = {"lora": "sipo", "full": "dpo", "trained_lora": "dpo_cm"}


def trained(function, output, engine, kind):
    """The result of a run in two processes."""
    run_ranks(function, output, engine, METHODS[kind], kind, 4, OPTIONS, directory=output)
    return torch.load(output / "result.pt", weights_only=False)


def saved_prediction(kind, folder):
    """What the pipeline says that users load, with plain diffusers."""
    if kind == "full":
        return predict(StableDiffusionPipeline.from_pretrained(folder))
    pipeline = tiny_stable_diffusion()
    pipeline.load_lora_weights(folder)
    return predict(pipeline)


def check_two_processes_are_one(engine, kind, folder):
    """Train in one process and in two, compare all that comes of it, and resume; returns the result of the two."""
    sharded_run.train(folder / "one", "one process", METHODS[kind], kind, 8, OPTIONS)
    one = torch.load(folder / "one" / "result.pt", weights_only=False)
    two = trained(sharded_run.train, folder / "two", engine, kind)

    assert f"{engine} on 2 processes (cpu)" in two["described"] and one["shares"] == 1.0
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
    for key, value in one["metrics"].items():
        if "rewards" in key or "loss" in key or "sipo" in key:
            assert two["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key

    # What was saved is the trained model, for plain diffusers; that of a checkpoint is that of its step.
    for place in (".", "checkpoint-2", "checkpoint-4"):
        saved, same = (saved_prediction(kind, folder / name / place) for name in ("one", "two"))
        learnt = (saved - predict(tiny_stable_diffusion())).abs().max()
        assert (saved - same).abs().max() < 1e-3 * learnt

    resumed = trained(sharded_run.resume, folder / "two", engine, kind)
    assert largest_difference(two["weights"], resumed["weights"]) < 1e-7
    assert resumed["loss"] == pytest.approx(two["loss"], abs=1e-6)
    return two
