# SPDX-License-Identifier: Apache-2.0
"""Before the first update every logit is 0, and a run of which that is not true ends with the reason."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import DPO, METHODS, SIPO, changed, logged, lora, make_trainer, trained_weights
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.start_check import start_gap
from trl_sipo.trainer.statistics import PairErrors

NAN = float("nan")
TARGETS = ["to_q", "to_v"]


@pytest.fixture(autouse=True)
def _banks_of_our_own(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_sipo.trainer.reference_bank.constants.HF_HOME", str(tmp_path / "home"))


def _add_dropout(trainer):
    """A dropout that nobody switched off, inside the policy alone."""
    block = trainer.adapter.denoiser.down_blocks[0].resnets[0]
    block.dropout.p = 0.5


def _with_trained_lora(**options):
    pipeline = tiny_stable_diffusion()
    torch.manual_seed(5)
    pipeline.unet = get_peft_model(pipeline.unet, lora(target_modules=TARGETS, init_lora_weights=False, **options))
    return pipeline


def _move(parameter):
    with torch.no_grad():
        parameter.add_(0.05)


def test_the_gap_is_that_of_the_larger_arm():
    errors = PairErrors(*torch.tensor([[0.25, 0.04], [0.09, 0.09], [0.16, 0.04], [0.09, 0.0]]).unbind())
    torch.testing.assert_close(start_gap(errors), torch.tensor([0.1, 0.3]))


SOUND = {
    "new_lora": {},
    "full": {"is_lora": False},
    "trained_lora": {"is_lora": False, "model": _with_trained_lora},
    "bfloat16": {"bf16": True},
    "bfloat16_full": {"bf16": True, "is_lora": False},
    "split": {"split_pair_backward": True},
    "split_bfloat16": {"split_pair_backward": True, "bf16": True},
    "checkpointed": {"gradient_checkpointing": True},
    "precomputed": {"precompute_ref_log_probs": True},
    # B of a new LoRA is zero, whatever the dropout of A's input.
    "lora_dropout": {"disable_dropout": False, "trainer_options": {"peft_config": lora(lora_dropout=0.5)}},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


def _check_sound(method, tmp_path, model=None, **options):
    model = None if model is None else model()
    trainer = make_trainer(method, tmp_path, model=model, max_steps=1, **options)
    assert trainer.recorder.start_check.is_due
    trainer.train()
    assert not trainer.recorder.start_check.is_due and trainer.state.global_step == 1


@pytest.mark.parametrize("name", SOUND)
def test_sound_runs_pass(name, tmp_path):
    _check_sound(SIPO, tmp_path, **SOUND[name])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_sound_methods_pass(method, tmp_path):
    _check_sound(method, tmp_path)


def _broken_run(kind, tmp_path, **options):
    """A trainer whose policy does not start at its reference."""
    if kind == "dropout":
        trainer = make_trainer(DPO, tmp_path, is_lora=False, **options)
        _add_dropout(trainer)
    elif kind == "lora_dropout":
        pipeline = _with_trained_lora(lora_dropout=0.5)
        trainer = make_trainer(DPO, tmp_path, model=pipeline, is_lora=False, disable_dropout=False, **options)
    elif kind == "new_lora":
        config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        trainer = make_trainer(DPO, tmp_path, trainer_options={"peft_config": config}, **options)
    elif kind == "trained_lora":
        trainer = make_trainer(DPO, tmp_path, model=_with_trained_lora(), is_lora=False, **options)
        for name, parameter in trainer.model.named_parameters():
            if ".ref." in name:
                _move(parameter)
    elif kind == "full":
        trainer = make_trainer(DPO, tmp_path, is_lora=False, **options)
        _move(trainer.adapter.denoiser.conv_in.weight)
    elif kind == "dtype":
        trainer = make_trainer(DPO, tmp_path, is_lora=False, **options)
        trainer.ref_model.to(torch.bfloat16)
    else:
        trainer = make_trainer(DPO, tmp_path, is_lora=False, **options)
        trainer.adapter.denoiser.conv_in.register_forward_hook(
            lambda module, inputs, output: output + 0.1 * torch.randn_like(output) if module.training else None
        )
    return trainer


ADVICE = {
    "dropout": r"dropout, which the reference has not: .*resnets\.0\.dropout.*`disable_dropout=True`",
    "lora_dropout": r"dropout, which the reference has not: .*lora_dropout.*`disable_dropout=True`",
    "new_lora": r"new LoRA changes the model from the start.*to_q.*`init_lora_weights=True`",
    "trained_lora": r"other weights than the policy.*lora_B\.default.*`ref_model`",
    "full": r"other weights than the policy.*: conv_in\.weight\. .*`ref_model`",
    "dtype": r"different dtypes: .*float32 and torch\.bfloat16.*Load both in one",
    "hook": r"Weights and dtypes of the two agree.*hook",
}


@pytest.mark.parametrize("kind", ADVICE)
@pytest.mark.parametrize("is_deferred", [False, True], ids=["at_once", "deferred"])
def test_each_way_to_break_it_is_told_before_the_weights_move(kind, is_deferred, tmp_path):
    trainer = _broken_run(kind, tmp_path)
    trainer.recorder.is_deferred = is_deferred
    before = trained_weights(trainer)
    with pytest.raises(ConfigurationError, match=rf"^Step 1: .*{ADVICE[kind]}.*`check_reference=False`"):
        trainer.train()
    after = trained_weights(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def _broken_before(step, trainer):
    """The trainer's loss, which is not finite in the first steps."""
    loss = trainer.compute_pair_loss
    return lambda logit, **parts: loss(logit, **parts) * (NAN if trainer.state.global_step < step else 1.0)


@pytest.mark.parametrize("kind", ["new_lora", "full"])
def test_the_first_step_that_is_taken_is_checked_when_those_before_it_are_left_out(kind, tmp_path):
    trainer = _broken_run(kind, tmp_path, on_nonfinite="skip", max_steps=5)
    before = trained_weights(trainer)
    trainer.compute_pair_loss = _broken_before(2, trainer)
    with pytest.raises(ConfigurationError, match="^Step 3: .*predict the same before the first update"):
        trainer.train()
    assert trainer.state.global_step == 2 and not changed(before, trained_weights(trainer))


def test_a_sound_run_whose_first_step_is_left_out_goes_on(tmp_path):
    trainer = make_trainer(DPO, tmp_path, on_nonfinite="skip", max_steps=3)
    trainer.compute_pair_loss = _broken_before(1, trainer)
    trainer.train()
    assert logged(trainer, "sipo/skipped_steps") == [1, 1, 1] and not trainer.recorder.start_check.is_due
    trainer.train()  # its weights have moved: it is not checked, whatever is left out
    assert logged(trainer, "sipo/skipped_steps") == [1, 1, 1]


def test_stored_errors_of_something_else(tmp_path):
    trainer = make_trainer(DPO, tmp_path, precompute_ref_log_probs=True)
    _move(trainer.adapter.denoiser.conv_in.weight)
    with pytest.raises(ConfigurationError, match=r"stored before.*home.trl_sipo_reference"):
        trainer.train()


@pytest.mark.parametrize("kind", ["new_lora", "full"])
def test_it_can_be_switched_off(kind, tmp_path):
    trainer = _broken_run(kind, tmp_path, check_reference=False, max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/chosen")[0] != 0


def test_another_reference_on_purpose_is_not_refused(tmp_path):
    other = tiny_stable_diffusion()
    _move(other.unet.conv_in.weight)
    trainer = make_trainer(DPO, tmp_path, is_lora=False, trainer_options={"ref_model": other}, max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/chosen")[0] != 0


def test_a_resumed_run_and_a_second_one_are_not_checked(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer = make_trainer(DPO, tmp_path, **options)
    trainer.train()
    trainer.train()
    resumed = make_trainer(DPO, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2 and logged(resumed, "rewards/margins")[-1] != 0
