# SPDX-License-Identifier: Apache-2.0
"""Two processes with four pairs each train what one process with eight does."""

import pytest
import torch

from tests.trainer.distributed_run import train
from tests.trainer.processes import run_ranks
from tests.trainer.run_logs import lines
from tests.trainer.runs import largest_difference

SAMPLES = {"sample_prompts": ["a red cat"], "sample_every_steps": 2, "sample_num_inference_steps": 1}
BANK = {"precompute_ref_log_probs": True, "num_ref_draws": 2, "center_crop": True, "random_flip": False}
ACCUMULATED = {"gradient_accumulation_steps": 2}
# At the default of 5000, rounding in the errors (1e-8) is what the losses differ by (5e-5). The updates are as large.
BETA = {"beta": 100.0, "learning_rate": 0.5}
# Method, what is trained (and with it the reference: LoRA off, a frozen copy of the LoRA, a frozen model), options of
# the run in one process and in two. All make steps of eight pairs.
CASES = {
    "lora": ("sipo", "new_lora", {"per_device_train_batch_size": 4, **ACCUMULATED}, {}),
    "trained lora, samples": ("dpo", "trained_lora", {**SAMPLES, **BETA}, {**SAMPLES, **BETA}),
    "full, accumulated": ("dpo_cm", "full", BETA, {"per_device_train_batch_size": 2, **ACCUMULATED, **BETA}),
    "precomputed reference": ("dpo", "new_lora", {**BANK, **BETA}, {**BANK, **BETA}),
}
# The same pairs in calls of the same size are the same numbers. Calls of eight and of four are rounded differently;
# the gradients of the two arms of a pair all but cancel and their roundings do not: as a share of the gradient's norm.
ROUNDING = {"lora": 1e-6}
OTHER_KERNELS = 2e-4
# Blocks are compiled inside the wrapper that exchanges the gradients; the one process is not compiled.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
SLOW_CASES = {"compiled": ("sipo", "new_lora", BETA, {**COMPILED, **BETA})}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_two_processes_are_one(case, tmp_path):
    method, kind, options_of_one, options_of_two = {**CASES, **SLOW_CASES}[case]
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", method, kind, 8, options_of_one)
    run_ranks(train, tmp_path / "two", method, kind, 4, options_of_two, directory=tmp_path / "two")
    one, two = (torch.load(tmp_path / name / "result.pt", weights_only=False) for name in ("one", "two"))

    assert (one["processes"], two["processes"]) == (1, 2)
    assert "one process on cpu" in one["described"] and "DDP on 2 processes (cpu)" in two["described"]
    assert "8 pairs per step" in one["described"] and "8 pairs per step" in two["described"]
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    assert largest_difference(one["gradient"], two["gradient"]) < ROUNDING.get(case, OTHER_KERNELS)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5) and two["masked"] == one["masked"]
    # Each of the seven held-out pairs counts once, although they do not divide among the processes.
    for key, value in one["metrics"].items():
        if "rewards" in key or "loss" in key or "sipo" in key:
            assert two["metrics"][key] == pytest.approx(value, rel=2e-3, abs=1e-4), key
    _check_same_log(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "training_args.bin").is_file()
    assert (tmp_path / "two" / "samples/step-000002.png").is_file() == ("sample_prompts" in options_of_two)


def _check_same_log(one, two):
    """Of all pairs, whichever process had them, and each held-out pair once."""
    (start,) = lines(two, "starts")
    assert start["environment"]["processes"] == 2
    assert [row["step"] for row in lines(two, "metrics")] == [row["step"] for row in lines(one, "metrics")]
    for line, other in zip(lines(one, "levels"), lines(two, "levels"), strict=True):
        assert (line["step"], line["split"]) == (other["step"], other["split"])
        assert sum(level["pairs"] for level in other["levels"]) == (8 if line["split"] == "train" else 3 * 7)
        for level, same in zip(line["levels"], other["levels"], strict=True):
            assert level.keys() == same.keys() and level["pairs"] == same["pairs"]
            for name in ("time", "chosen_error", "rejected_ref_error", "importance_weight"):
                assert same[name] == pytest.approx(level[name], rel=2e-3)
