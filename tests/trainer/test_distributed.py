# SPDX-License-Identifier: Apache-2.0
"""Two processes with four pairs each train what one process with eight does."""

import pytest
import torch

from tests.trainer.distributed_run import train
from tests.trainer.processes import run_ranks
from tests.trainer.runs import largest_difference

SAMPLES = {"sample_prompts": ["a red cat"], "sample_every_steps": 2, "sample_num_inference_steps": 1}
BANK = {"precompute_ref_log_probs": True, "num_ref_draws": 2, "center_crop": True, "random_flip": False}
ACCUMULATED = {"gradient_accumulation_steps": 2}
# Method, what is trained (and with it the reference: LoRA off, a frozen copy of the LoRA, a frozen model), pairs per
# process and call, options of the run in one process and in two.
CASES = {
    "lora": ("sipo", "new_lora", 4, {}, {}),
    "trained lora, samples": ("dpo", "trained_lora", 4, SAMPLES, SAMPLES),
    "full, accumulated": ("dpo_cm", "full", 2, {}, ACCUMULATED),
    "precomputed reference": ("dpo", "new_lora", 4, BANK, BANK),
}
# Blocks are compiled inside the wrapper that exchanges the gradients; the one process is not compiled.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
SLOW_CASES = {"compiled": ("sipo", "new_lora", 4, {}, COMPILED)}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_two_processes_are_one(case, tmp_path):
    method, kind, batch_size, options_of_one, options_of_two = {**CASES, **SLOW_CASES}[case]
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", method, kind, 8, options_of_one)
    run_ranks(train, tmp_path / "two", method, kind, batch_size, options_of_two, directory=tmp_path / "two")
    one, two = (torch.load(tmp_path / name / "result.pt", weights_only=False) for name in ("one", "two"))

    assert (one["processes"], two["processes"]) == (1, 2)
    assert "one process on cpu" in one["described"] and "DDP on 2 processes (cpu)" in two["described"]
    assert "8 pairs per step" in one["described"] and "8 pairs per step" in two["described"]
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    # Of the norm of a difference: the gradients of the two arms of a pair all but cancel, their roundings do not.
    assert largest_difference(one["gradient"], two["gradient"]) < 2e-4
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-3) and two["masked"] == one["masked"]
    # Each of the seven held-out pairs counts once, although they do not divide among the processes.
    for key, value in one["metrics"].items():
        if "rewards" in key or "loss" in key or "sipo" in key:
            assert two["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    assert (tmp_path / "two" / "training_args.bin").is_file()
    assert (tmp_path / "two" / "samples/step-000002.png").is_file() == ("sample_prompts" in options_of_two)
