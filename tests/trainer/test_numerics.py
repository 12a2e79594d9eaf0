# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity end a run with the pairs and timesteps that gave them; they never pass for a masked pair."""

import math

import datasets
import numpy as np
import pytest
import torch

from tests.trainer.runs import DPO, METHODS, SIPO, changed, logged, make_trainer, trained_weights
from trl_sipo.cli import main as command_line
from trl_sipo.errors import NumericalError
from trl_sipo.trainer.nonfinite import BrokenPairs, pairs_message


def _latent_pairs(huge):
    """Eight pairs of latents of which the chosen one of `huge` is so large that its squared error overflows."""
    latents = np.random.default_rng(0).normal(size=(2, 8, 4, 8, 8)).astype("float32")
    latents[0, huge] *= 1e30
    return datasets.Dataset.from_dict(
        {"prompt": ["a cat"] * 8, "chosen_latents": latents[0].tolist(), "rejected_latents": latents[1].tolist()}
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_pair_that_overflows_is_named_before_the_weights_move(method, tmp_path):
    trainer = make_trainer(method, tmp_path, pairs=_latent_pairs(3), per_device_train_batch_size=8)
    before = trained_weights(trainer)
    with pytest.raises(NumericalError, match=r"Step 1: .* for 1 of 8 pairs: pair_index 3 \(timestep \d+\)\. .*bf16"):
        trainer.train()
    after = trained_weights(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("method", [DPO, SIPO], ids=lambda method: method.name)
@pytest.mark.parametrize("part", ["policy", "reference"])
def test_weights_that_are_nan_end_the_run(method, part, tmp_path):
    trainer = make_trainer(method, tmp_path, is_lora=False, max_steps=2)
    denoiser = trainer.adapter.denoiser if part == "policy" else trainer.ref_model
    with torch.no_grad():
        denoiser.conv_out.weight.view(-1)[0] = float("nan")
    with pytest.raises(NumericalError, match="for 4 of 4 pairs"):
        trainer.train()


def test_a_policy_that_diverges_is_noticed_in_the_next_step(tmp_path):
    trainer = make_trainer(SIPO, tmp_path, learning_rate=1e30, max_steps=3, optim="sgd", max_grad_norm=0.0)
    with pytest.raises(NumericalError, match="Step 2: .*learning_rate"):
        trainer.train()


def test_evaluation_names_the_pair_too(tmp_path):
    trainer = make_trainer(DPO, tmp_path, pairs=_latent_pairs(0), trainer_options={"eval_dataset": _latent_pairs(5)})
    with pytest.raises(NumericalError, match=r"Evaluation: .* for 1 of 4 pairs: pair_index 5 \(timestep 166\)"):
        trainer.evaluate()


def test_a_loss_of_nan_is_shown_as_nan(tmp_path):
    assert make_trainer(DPO, tmp_path).args.logging_nan_inf_filter is False


def test_a_long_list_is_cut():
    message = pairs_message("Step 7", BrokenPairs("loss", list(range(20)), [0.5] * 20, 20, 20))
    assert "for 20 of 20 pairs" in message and "and 12 more" in message and "8 (" not in message


def test_the_command_line_says_it_in_one_line(monkeypatch, capsys):
    def run(command, argv):
        raise NumericalError("Step 3: not finite")

    monkeypatch.setattr("trl_sipo.scripts.env.run", run)
    assert command_line.main(["env"]) == 2
    assert capsys.readouterr().err == "trl-sipo env: Step 3: not finite\n"


def test_an_overflowing_gradient_is_the_scalers_business(tmp_path):
    """A scale that is too large by far: the first step is left out, the scale falls, and training goes on."""
    trainer = make_trainer(SIPO, tmp_path, max_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    before = trained_weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.accelerator.scaler.get_scale() == 2.0**27
    assert not math.isfinite(logged(trainer, "grad_norm")[0]) and math.isfinite(logged(trainer, "grad_norm")[-1])
    after = trained_weights(trainer)
    assert changed(before, after) and all(value.isfinite().all() for value in after.values())
