# SPDX-License-Identifier: Apache-2.0
"""`attention_backend`: refused before anything is loaded, the same for policy and reference, and kept in no file."""

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from tests.adapters.backbone_cases import BACKBONES
from tests.trainer.media import pairs_for
from tests.trainer.runs import (
    DPO,
    SIPO,
    changed,
    largest_difference,
    logged,
    make_config,
    make_trainer,
    snapshot,
    trained_weights,
)
from tests.trainer.test_backbones import trainer_for
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer import attention
from trl_sipo.trainer.attention import check_attention_backend

CPU = torch.device("cpu")


def _case(name):
    return next(case for case in BACKBONES if case.name == name)


def _kernels(denoiser):
    """The kernels that the layers of a denoiser were told."""
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    return {processor._attention_backend for processor in processors if hasattr(processor, "_attention_backend")}


@pytest.fixture
def calls(monkeypatch):
    """The kernels that are called, in order."""
    seen = []
    backends = attention_dispatch._AttentionBackendRegistry._backends

    def spied(name, kernel):
        return lambda *args, **kwargs: seen.append(name.value) or kernel(*args, **kwargs)

    for name, kernel in dict(backends).items():
        monkeypatch.setitem(backends, name, spied(name, kernel))
    return seen


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_policy_reference_and_samples_use_it(is_lora, calls, tmp_path):
    samples = {"sample_prompts": ["a cat"], "sample_every_steps": 1, "sample_num_inference_steps": 2}
    options = {"is_lora": is_lora, "max_steps": 1, "learning_rate": 1e-3}
    trainer = trainer_for(_case("flux-dev"), tmp_path, attention_backend="_native_math", **options, **samples)
    before = snapshot(trainer.model)
    calls.clear()
    trainer.train()
    assert set(calls) == {"_native_math"} and changed(before, snapshot(trainer.model))
    plain = trainer_for(_case("flux-dev"), tmp_path / "plain", **options)
    plain.train()
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert largest_difference(trained_weights(plain), trained_weights(trainer)) < 1e-4


def test_a_given_reference_uses_it_too(tmp_path):
    case = _case("flux-dev")
    for trainer_options in ({}, {"ref_model": case.build()}):
        trainer = SIPO.trainer_class(
            case.build(),
            args=make_config(SIPO, tmp_path, attention_backend="_native_math", resolution=list(case.media_shape[1:])),
            train_dataset=pairs_for(case, tmp_path),
            **trainer_options,
        )
        assert trainer.ref_model is not trainer.model
        assert _kernels(trainer.model) == _kernels(trainer.ref_model) == {AttentionBackendName._NATIVE_MATH}


def test_other_models_keep_theirs(tmp_path):
    """diffusers' own method would also change the kernel of every model that was told none."""
    trainer_for(_case("wan21"), tmp_path, attention_backend="_native_math", max_steps=1)
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def test_both_experts_use_it(tmp_path):
    trainer = trainer_for(_case("wan22_a14b"), tmp_path, attention_backend="_native_math", max_steps=1)
    for expert in trainer.adapter.denoiser.experts.values():
        assert _kernels(expert) == {AttentionBackendName._NATIVE_MATH}


def test_no_file_keeps_it(tmp_path):
    options = {"is_lora": False, "max_steps": 1, "learning_rate": 0.0}
    files = []
    for name in ("_native_math", None):
        trainer = trainer_for(_case("flux-dev"), tmp_path / str(name), attention_backend=name, **options)
        trainer.save_model()
        folder = tmp_path / str(name) / "run" / "transformer"
        files.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flsh", "diffusers knows"),
        ("Native", "diffusers knows"),
        ("sage", "sageattention"),
        ("_native_cudnn", "cannot train here, in torch.float32 on cpu"),
        ("flex", "backward"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_loaded(name, reason, tmp_path):
    with pytest.raises(ConfigurationError, match=reason):
        make_trainer(DPO, tmp_path, model=str(tmp_path / "nowhere"), attention_backend=name)


def test_a_kernel_without_a_gradient_is_refused(monkeypatch):
    """Those for inference alone would train nothing, and say nothing."""
    dispatch = attention.dispatch_attention_fn
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda *args: dispatch(*args).detach())
    with pytest.raises(ConfigurationError, match="cannot train here.*grad"):
        check_attention_backend("native", CPU, torch.bfloat16)


@pytest.mark.parametrize("name", ["sd-epsilon-DDIM", "sd3", "cogvideox_2b"])
def test_layers_that_call_pytorchs_attention_refuse_it(name, tmp_path):
    with pytest.raises(ConfigurationError, match="call PyTorch's own attention"):
        trainer_for(_case(name), tmp_path, attention_backend="native")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["native", "_native_flash", "_native_cudnn"])
def test_kernels_of_a_gpu(name, tmp_path):
    options = {"use_cpu": False, "bf16": True, "max_steps": 2}
    trainer = trainer_for(_case("flux-dev"), tmp_path, attention_backend=name, **options)
    plain = trainer_for(_case("flux-dev"), tmp_path / "plain", **options)
    for run in (trainer, plain):
        run.train()
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-1)
