# SPDX-License-Identifier: Apache-2.0
"""The five hooks, each overridden alone, and the order of the two forward passes."""

import math

import pytest
import torch

from tests.trainer.runs import DPO, METHODS, SIPO, logged, make_trainer

LN2 = math.log(2)


def _subclass(method, **methods):
    return type("Sub", (method.trainer_class,), methods)


def test_sample_noise_levels_takes_effect(tmp_path):
    seen = []

    def sample_noise_levels(self, generators):
        return self.noise_schedule.level(torch.full((len(generators),), 700))

    def compute_importance_weights(self, chosen_error, rejected_error, level):
        seen.append(level.timestep)
        return SIPO.trainer_class.compute_importance_weights(self, chosen_error, rejected_error, level)

    spy = {"compute_importance_weights": compute_importance_weights}
    trainer = make_trainer(
        SIPO, tmp_path, trainer_class=_subclass(SIPO, sample_noise_levels=sample_noise_levels, **spy), max_steps=2
    )
    trainer.train()
    assert torch.cat(seen).tolist() == [700] * 8


@pytest.mark.parametrize(("log_weight", "masked"), [(-5.0, 1.0), (0.0, 0.0)])
def test_compute_importance_weights_takes_effect(log_weight, masked, tmp_path):
    def compute_importance_weights(self, chosen_error, rejected_error, level):
        return torch.full_like(chosen_error, log_weight), torch.zeros_like(rejected_error)

    subclass = _subclass(SIPO, compute_importance_weights=compute_importance_weights)
    trainer = make_trainer(SIPO, tmp_path, trainer_class=subclass)
    trainer.train()
    assert logged(trainer, "sipo/masked_fraction") == [masked] * 3
    assert logged(trainer, "sipo/importance_weight") == pytest.approx([math.exp(log_weight)] * 3)


def test_clip_importance_weights_takes_effect(tmp_path):
    def clip_importance_weights(self, pair_log_weight):
        return torch.full_like(pair_log_weight, 0.25)

    subclass = _subclass(SIPO, clip_importance_weights=clip_importance_weights)
    trainer = make_trainer(SIPO, tmp_path, trainer_class=subclass, objective="dpo_cm", mask=False)
    trainer.train()
    assert logged(trainer, "sipo/weight") == [0.25] * 3
    assert logged(trainer, "loss")[0] == pytest.approx(0.25 * LN2, rel=1e-5)


def test_mask_timesteps_takes_effect(tmp_path):
    def mask_timesteps(self, pair_log_weight):
        return torch.arange(len(pair_log_weight)) == 0

    trainer = make_trainer(SIPO, tmp_path, trainer_class=_subclass(SIPO, mask_timesteps=mask_timesteps))
    trainer.train()
    assert logged(trainer, "sipo/masked_fraction") == [0.75] * 3
    # The mean is over the full batch, never over the pairs that are kept.
    assert logged(trainer, "loss")[0] == pytest.approx(LN2 / 4, rel=1e-5)


def test_compute_pair_loss_takes_effect(tmp_path):
    def compute_pair_loss(self, logit, weight, keep):
        return 3.0 + 0.0 * logit

    trainer = make_trainer(DPO, tmp_path, trainer_class=_subclass(DPO, compute_pair_loss=compute_pair_loss))
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([3.0] * 3)


def test_a_plain_objective_takes_mask_and_weight_from_the_hooks(tmp_path):
    """The base hooks: weight 1, everything kept."""
    trainer = make_trainer(DPO, tmp_path, max_steps=1)
    trainer.train()
    assert logged(trainer, "sipo/weight") == [1.0] and logged(trainer, "sipo/masked_fraction") == [0.0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_one_reference_and_one_policy_forward_reference_first(method, is_lora, tmp_path):
    trainer = make_trainer(method, tmp_path, is_lora=is_lora, max_steps=2)
    calls = []
    forward = trainer.adapter.forward

    def spy(denoiser, noisy_latents, *args, **kwargs):
        prediction = forward(denoiser, noisy_latents, *args, **kwargs)
        calls.append((len(noisy_latents), prediction.requires_grad))
        return prediction

    trainer.adapter.forward = spy
    trainer.train()
    assert calls == [(8, False), (8, True)] * 2  # the concatenated pairs of a batch of 4


def test_each_pair_shares_its_noise_level_and_noise(tmp_path):
    trainer = make_trainer(DPO, tmp_path, max_steps=1)
    inputs = []
    forward = trainer.adapter.forward

    def spy(denoiser, noisy_latents, level, conditioning, *args):
        inputs.append((noisy_latents, level, conditioning))
        return forward(denoiser, noisy_latents, level, conditioning, *args)

    trainer.adapter.forward = spy
    trainer.train()
    (noisy, level, conditioning), (again, *_) = inputs
    assert torch.equal(noisy, again)
    for values in (level.timestep, level.alpha_t, level.sigma_t, conditioning["prompt_embeds"]):
        chosen, rejected = values.chunk(2)
        assert torch.equal(chosen, rejected)
    assert len(level.timestep.unique()) > 1
