# SPDX-License-Identifier: Apache-2.0
"""bfloat16 and float16, TF32, and activation checkpointing."""

import math

import pytest
import torch

from tests.tiny.stable_diffusion_3 import tiny_stable_diffusion_3
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    DPO,
    METHODS,
    SIPO,
    changed,
    collate_first,
    logged,
    lora,
    make_trainer,
    predict,
    snapshot,
)
from trl_sipo.errors import ConfigurationError

lora_and_full = pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@lora_and_full
def test_bfloat16_on_the_cpu(method, is_lora, tmp_path):
    """Weights stay float32, the network runs in bfloat16, errors and losses are float32."""
    trainer = make_trainer(method, tmp_path, is_lora=is_lora, bf16=True)
    before, errors, dtypes = snapshot(trainer.model), [], set()
    pair_errors = trainer.pair_errors
    trainer.pair_errors = lambda *args: errors.append(pair_errors(*args)) or errors[-1]
    for denoiser in {trainer.adapter.denoiser, trainer.ref_model} - {None}:
        denoiser.conv_in.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {errors[0].chosen.dtype, errors[0].ref_chosen.dtype} == {torch.float32}
    assert {value.dtype for value in snapshot(trainer.model).values()} == {torch.float32}
    assert changed(before, snapshot(trainer.model))
    assert logged(trainer, "rewards/accuracies")[0] == 0.5  # policy and reference start equal in half precision too
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_a_lora_on_a_half_precision_base(tmp_path):
    """The frozen base may be half precision; the LoRA is float32."""
    pipeline = tiny_stable_diffusion()
    pipeline.unet.to(torch.bfloat16)
    pipeline.text_encoder.to(torch.bfloat16)
    trainer = make_trainer(DPO, tmp_path, model=pipeline, learning_rate=1e-2, bf16=True)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    assert logged(trainer, "rewards/chosen")[-1] != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_cannot_be_fine_tuned(dtype, tmp_path):
    pipeline = tiny_stable_diffusion()
    pipeline.unet.to(dtype)
    with pytest.raises(ConfigurationError, match="float32"):
        make_trainer(DPO, tmp_path, model=pipeline, is_lora=False)


@pytest.mark.parametrize(("bf16", "is_lora"), [(True, True), (True, False), (False, True)])
def test_what_is_loaded_by_name(bf16, is_lora, tmp_path):
    """A frozen base is loaded in half precision; the VAE, trained weights and what is saved beside them are not."""
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    trainer = make_trainer(DPO, tmp_path / "run", model=base, is_lora=is_lora, bf16=bf16, max_steps=1)
    pipeline = trainer.adapter.pipeline
    expected = torch.bfloat16 if bf16 and is_lora else torch.float32
    assert pipeline.unet.conv_in.weight.dtype == pipeline.text_encoder.dtype == expected
    assert pipeline.vae.dtype == torch.float32
    trainer.train()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16, {"unet": torch.bfloat16, "default": torch.float32}])
def test_a_dtype_can_be_given_for_loading(key, value, tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    trainer = make_trainer(DPO, tmp_path / "run", model=str(tmp_path / "base"), model_init_kwargs={key: value})
    pipeline = trainer.adapter.pipeline
    assert pipeline.unet.conv_in.weight.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32


def test_an_unknown_dtype_is_an_error(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigurationError, match="bfloat17"):
        make_trainer(DPO, tmp_path / "run", model=str(tmp_path / "base"), model_init_kwargs={"dtype": "bfloat17"})


def test_bfloat16_is_not_the_default_without_an_accelerator(tmp_path, monkeypatch):
    for available in (False, True):
        monkeypatch.setattr(
            "trl_sipo.trainer.base_config.is_torch_bf16_gpu_available", lambda available=available: available
        )
        config = DPO.config_class(str(tmp_path), use_cpu=True)
        assert config.bf16 is False
    assert DPO.config_class(str(tmp_path), use_cpu=True, bf16=True).bf16 is True


@lora_and_full
def test_activation_checkpointing_changes_nothing_but_memory(is_lora, tmp_path):
    """On by default as in TRL: the same loss and the same gradients."""
    assert DPO.config_class(str(tmp_path)).gradient_checkpointing
    results = []
    for switch in (False, True):
        trainer = make_trainer(DPO, tmp_path, is_lora=is_lora, gradient_checkpointing=switch, max_steps=2)
        runs = []
        block = trainer.adapter.denoiser.up_blocks[-1].resnets[-1]
        block.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))
        trainer.train()
        assert trainer.adapter.denoiser.is_gradient_checkpointing is switch
        # Each of two steps: the policy, with checkpointing once more in the backward pass, and a LoRA's reference.
        assert len(runs) == 2 * (1 + switch + is_lora)
        results.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), snapshot(trainer.model)))
    (loss, norm, weights), (other_loss, other_norm, other_weights) = results
    assert loss == pytest.approx(other_loss, rel=1e-6) and norm == pytest.approx(other_norm, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_options_reach_torch(tmp_path, monkeypatch):
    from trl_sipo.trainer import _trl_compat

    seen = []
    checkpoint = _trl_compat.checkpoint
    monkeypatch.setattr(
        _trl_compat, "checkpoint", lambda *args, **kwargs: seen.append(kwargs) or checkpoint(*args, **kwargs)
    )
    options = {"preserve_rng_state": False}
    trainer = make_trainer(
        DPO, tmp_path, gradient_checkpointing=True, activation_checkpointing_kwargs=options, max_steps=1
    )
    trainer.train()
    assert seen and all(call == {"use_reentrant": False, "preserve_rng_state": False} for call in seen)


@pytest.mark.parametrize("options", [{"every_n_layers": 2}, {"offload": True}])
def test_activation_checkpointing_options_that_diffusers_lacks_are_errors(options, tmp_path):
    trainer = make_trainer(
        DPO, tmp_path, gradient_checkpointing=True, activation_checkpointing_kwargs=options, max_steps=1
    )
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        trainer.train()


def test_lora_dropout_is_used_only_without_disable_dropout(tmp_path, caplog):
    for disable, expected in ((True, True), (False, False)):
        trainer = make_trainer(
            DPO, tmp_path, disable_dropout=disable, trainer_options={"peft_config": lora(lora_dropout=0.5)}
        )
        batch = collate_first(trainer)
        trainer.model.train()
        losses = [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]
        rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
        assert (rates == {0}) is expected
        assert losses[0] == losses[1]  # B is zero at the start, so that dropout of A's input changes nothing yet
        assert any("lora_dropout" in record.getMessage() for record in caplog.records) is disable
        caplog.clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_tf32_without_a_gpu_that_has_it_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="tf32=True.*NVIDIA.*Remove"):
        DPO.config_class(str(tmp_path), tf32=True)
    assert DPO.config_class(str(tmp_path), tf32=False).tf32 is False


@pytest.mark.parametrize(("bf16", "is_lora"), [(True, True), (True, False), (False, True)])
def test_what_dtypes_a_loaded_pipeline_trains_in(bf16, is_lora, tmp_path):
    """A pipeline that is given loaded keeps its dtypes, whatever the precision of the run; a LoRA is float32."""
    pipeline = tiny_stable_diffusion()
    pipeline.text_encoder.to(torch.bfloat16)
    trainer = make_trainer(DPO, tmp_path, model=pipeline, is_lora=is_lora, bf16=bf16, max_steps=1)
    trainer.train()
    assert pipeline.text_encoder.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@lora_and_full
def test_half_precision_on_a_gpu(precision, is_lora, tmp_path):
    trainer = make_trainer(SIPO, tmp_path, is_lora=is_lora, use_cpu=False, bf16=None, fp16=precision == "fp16")
    assert trainer.args.bf16 is (precision == "bf16")
    before = snapshot(trainer.model)
    trainer.train()
    assert changed(before, snapshot(trainer.model)) and all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert predict(trainer.adapter.pipeline.to("cpu")).isfinite().all()


def test_a_component_can_be_left_out(tmp_path):
    tiny_stable_diffusion_3().save_pretrained(tmp_path / "base")
    left_out = {"text_encoder_3": None, "tokenizer_3": None}
    options = {"model": str(tmp_path / "base"), "model_init_kwargs": left_out, "resolution": 32, "max_steps": 1}
    trainer = make_trainer(DPO, tmp_path / "run", **options)
    assert trainer.adapter.pipeline.text_encoder_3 is None
    trainer.train()
