# SPDX-License-Identifier: Apache-2.0
"""Optimisers by transformers' names: they train, and a resumed run goes on with their state."""

import importlib.util
import math

import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    SIPO,
    changed,
    largest_difference,
    logged,
    lora,
    make_trainer,
    snapshot,
    trained_weights,
)
from trl_sipo.trainer.checkpoint_files import MANIFEST_FILE

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
EIGHT_BIT = ("adamw_bnb_8bit", "paged_adamw_8bit")
OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", *EIGHT_BIT)
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
# Of smaller tensors than 4096 numbers, bitsandbytes keeps the state in 32 bits.
WIDE_LORA = {"peft_config": lora(r=512)}


def _parameters(names):
    return [pytest.param(name, marks=needs_bitsandbytes if name in EIGHT_BIT else []) for name in names]


@pytest.mark.parametrize("optimiser", _parameters(OPTIMISERS))
def test_an_optimiser_trains_and_resumes(optimiser, tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    options = {
        "model": str(tmp_path / "base"),
        "optim": optimiser,
        "trainer_options": WIDE_LORA,
        "mask": False,
        "learning_rate": 1e-3,
        "max_steps": 4,
    }
    whole = make_trainer(SIPO, tmp_path / "whole", save_strategy="steps", save_steps=2, **options)
    before = snapshot(whole.model)
    whole.train()
    moved = changed(before, snapshot(whole.model))
    assert moved and all("lora_" in name for name in moved)
    assert all(math.isfinite(loss) for loss in logged(whole, "loss"))

    resumed = make_trainer(SIPO, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert largest_difference(trained_weights(whole), trained_weights(resumed)) < 1e-6
    forgetful = make_trainer(SIPO, tmp_path / "forgetful", **options)
    file = tmp_path / "whole" / "checkpoint-2" / "optimizer.pt"
    torch.save({**torch.load(file), "state": {}}, file)
    file.with_name(MANIFEST_FILE).unlink()  # which would find that the file was changed
    forgetful.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    has_state = optimiser != "sgd"
    assert (largest_difference(trained_weights(whole), trained_weights(forgetful)) > 1e-6) is has_state


def _states(trainer):
    return [value for state in trainer.optimizer.state.values() for value in state.values()]


@needs_bitsandbytes
@pytest.mark.parametrize("optimiser", EIGHT_BIT)
def test_moments_are_kept_in_eight_bits(optimiser, tmp_path):
    trainer = make_trainer(SIPO, tmp_path, optim=optimiser, trainer_options=WIDE_LORA, max_steps=1)
    trainer.train()
    assert torch.uint8 in {value.dtype for value in _states(trainer) if isinstance(value, torch.Tensor)}


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_an_8_bit_optimiser_without_bitsandbytes_says_what_to_install(tmp_path):
    with pytest.raises(ImportError, match="bitsandbytes"):
        make_trainer(SIPO, tmp_path, optim="adamw_bnb_8bit").train()


def test_the_fused_optimiser_is_the_plain_one_in_one_kernel(tmp_path):
    runs = []
    for optimiser in ("adamw_torch", "adamw_torch_fused"):
        trainer = make_trainer(SIPO, tmp_path, optim=optimiser, mask=False, is_lora=False)
        trainer.train()
        assert bool(trainer.optimizer.defaults["fused"]) is (optimiser == "adamw_torch_fused")
        runs.append(trained_weights(trainer))
    assert largest_difference(*runs) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("optimiser", _parameters(OPTIMISERS))
def test_an_optimiser_on_a_gpu(optimiser, tmp_path):
    trainer = make_trainer(SIPO, tmp_path, optim=optimiser, trainer_options=WIDE_LORA, mask=False, use_cpu=False)
    before = snapshot(trainer.model)
    trainer.train()
    assert changed(before, snapshot(trainer.model))
    if optimiser in EIGHT_BIT:
        assert torch.uint8 in {value.dtype for value in _states(trainer) if isinstance(value, torch.Tensor)}
