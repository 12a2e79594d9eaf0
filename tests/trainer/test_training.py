# SPDX-License-Identifier: Apache-2.0
"""Every method, with a LoRA and with all weights: it trains what it should, by the loss that it names."""

import inspect
import math

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    DPO,
    METHODS,
    POLY_DPO,
    SIPO,
    changed,
    logged,
    lora,
    make_trainer,
    preference_pairs,
    snapshot,
)
from trl_sipo.core.objectives import diffusion_dpo_loss
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.statistics import PairErrors

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
lora_and_full = pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])


@every_method
@lora_and_full
def test_trains_what_it_should(method, is_lora, tmp_path):
    trainer = make_trainer(method, tmp_path, is_lora=is_lora)
    pipeline, model = trainer.adapter.pipeline, trainer.model
    before, vae, text = snapshot(model), snapshot(pipeline.vae), snapshot(pipeline.text_encoder)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    trainer.train()

    moved = changed(before, snapshot(model))
    # Two of the parts of a pair can be masked, so that not every step reaches every weight; in three steps most do.
    assert moved and moved <= trainable and len(moved) > 0.9 * len(trainable)
    assert all(".lora_" in name for name in moved) is is_lora
    assert not changed(vae, snapshot(pipeline.vae)) and not changed(text, snapshot(pipeline.text_encoder))
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


@every_method
@lora_and_full
def test_first_loss_is_that_of_no_preference(method, is_lora, tmp_path):
    """A fresh policy is its reference: ln 2 per unmasked pair (plus alpha / 2), times C&M's weight."""
    trainer = make_trainer(method, tmp_path, is_lora=is_lora, max_steps=1)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    kept = 1 - row["sipo/masked_fraction"]
    expected = method.fresh_loss(math.log(2)) * kept
    if method.name == "dpo_cm":
        assert 0.8 * expected <= row["loss"] <= expected  # times the weight, at most 1
    else:
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["rewards/margins"] == row["rewards/chosen"] == row["rewards/rejected"] == 0.0
    assert row["rewards/accuracies"] == 0.5 and row["drift/chosen_error"] == 0.0


@pytest.mark.parametrize(
    ("method", "weight_grad"),
    [(method, True) for method in METHODS] + [(SIPO, False)],  # only SIPO's weight carries a gradient
    ids=lambda value: getattr(value, "name", f"weight_grad_{value}"),
)
def test_pair_loss_is_the_public_function(method, weight_grad, tmp_path):
    """The loss that the hooks compose, on errors of a moved policy, and its gradient w.r.t. these errors."""
    options, loss_options = {}, dict(method.loss_options)
    if method.is_weighted:
        options["weight_grad"] = weight_grad
    if method.name == "sipo":
        loss_options["weight_grad"] = weight_grad
    trainer = make_trainer(method, tmp_path, **options)
    level = trainer.sample_noise_levels([torch.Generator().manual_seed(seed) for seed in range(64)])
    errors = _errors(64, trainer)
    actual, _ = trainer.pair_loss(errors, level)

    again = _errors(64, trainer)
    arguments = [again.chosen_logratio, again.rejected_logratio]
    if method.is_weighted:
        arguments += trainer.compute_importance_weights(again.chosen, again.rejected, level)
    expected = method.loss(*arguments, beta=trainer.beta, **loss_options)

    assert torch.equal(actual, expected)
    gradients = [
        torch.autograd.grad(loss.sum(), [pair.chosen, pair.rejected])
        for loss, pair in ((actual, errors), (expected, again))
    ]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=0)
    assert len(actual.unique()) > 20


def _errors(count, trainer):
    values = torch.rand(4, count, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.2
    chosen, rejected, ref_chosen, ref_rejected = values.unbind()
    return PairErrors(chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected)


def test_the_switches_lead_back_to_diffusion_dpo(tmp_path):
    """Mask and weight off, and no polynomial term: SIPO is Diffusion-DPO, to the bit."""
    for objective in ("sipo", "dpo_cm"):
        trainer = make_trainer(SIPO, tmp_path, objective=objective, mask=False, reweight=False)
        errors = _errors(32, trainer)
        level = trainer.sample_noise_levels([torch.Generator().manual_seed(seed) for seed in range(32)])
        loss, _ = trainer.pair_loss(errors, level)
        expected = diffusion_dpo_loss(errors.chosen_logratio, errors.rejected_logratio, beta=trainer.beta)
        assert torch.equal(loss, expected)


def test_the_polynomial_term_composes_with_sipo(tmp_path):
    trainer = make_trainer(SIPO, tmp_path, mask=False, reweight=False, poly_alpha=8.0, beta=1000.0)
    other = make_trainer(POLY_DPO, tmp_path, beta=1000.0)
    level = trainer.sample_noise_levels([torch.Generator().manual_seed(seed) for seed in range(16)])
    errors = _errors(16, trainer)
    assert torch.equal(trainer.pair_loss(errors, level)[0], other.pair_loss(errors, level)[0])


@every_method
def test_is_a_trl_trainer(method):
    assert issubclass(method.trainer_class, DPOTrainer) and issubclass(method.config_class, DPOConfig)
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (method.trainer_class, DPOTrainer))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_a_configuration_is_made_when_none_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = DPO.trainer_class(tiny_stable_diffusion(), train_dataset=preference_pairs(), peft_config=lora())
    assert isinstance(trainer.args, DPO.config_class) and "Diffusion-DPO" in trainer.args.output_dir


@pytest.mark.parametrize(("batch_size", "drops"), [(9, True), (8, True), (9, False)])
def test_a_batch_that_the_data_does_not_fill(batch_size, drops, tmp_path):
    """With `dataloader_drop_last` there would be no step at all; that is said before training."""
    options = {"per_device_train_batch_size": batch_size, "dataloader_drop_last": drops, "max_steps": 1}
    if drops and batch_size > 8:
        with pytest.raises(ConfigurationError, match="8 training pairs.*of 9"):
            make_trainer(DPO, tmp_path, **options)
    else:
        assert make_trainer(DPO, tmp_path, **options).train().global_step == 1
