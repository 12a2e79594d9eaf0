# SPDX-License-Identifier: Apache-2.0
"""LoRA files: what plain diffusers loads is exactly what was trained, and training resumes to the bit."""

import json

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.adapters.backbone_cases import BACKBONES, PROMPTS, BackboneCase
from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.adapters.lora import LORA_FILE_NAME
from trl_sipo.errors import BackboneError, ConfigurationError

each_backbone = pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case.name)

LORA_OPTIONS = {
    "alpha_equals_rank": {"r": 4, "lora_alpha": 4},
    "alpha_above_rank": {"r": 4, "lora_alpha": 16},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "regex": {"target_modules": r".*attn2?.*\.(to_q|to_out\.0)"},
    "all_linear": {"target_modules": "all-linear"},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5}},
    "lora_bias": {"lora_bias": True, "init_lora_weights": True},
}


def build_lora(adapter: BackboneAdapter, seed: int = 0, **options) -> PeftModel:
    """A PEFT model in eval mode with random LoRA weights, as after some training."""
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": list(adapter.lora_target_modules), **options}
    denoiser = get_peft_model(adapter.denoiser, LoraConfig(**arguments)).eval()
    randomize(denoiser, seed)
    return denoiser


def randomize(denoiser: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "magnitude" in name else 0.3 * noise)


def predict(adapter: BackboneAdapter, denoiser: nn.Module, case: BackboneCase) -> Tensor:
    latents = torch.randn(2, *adapter.latent_shape(*case.media_shape[-2:]), generator=torch.Generator().manual_seed(5))
    level = adapter.noise_schedule.level_at(torch.tensor([0.2, 0.7]))
    with torch.no_grad():
        return adapter.forward(denoiser, latents, level, adapter.collate(adapter.encode_prompts(PROMPTS)))


def lora_weights(denoiser: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in denoiser.named_parameters() if f".{name}" in key}


def saved_lora(case: BackboneCase, directory, **options) -> Tensor:
    """Save a trained LoRA and give its prediction."""
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter, **options)
    adapter.save_lora(denoiser, directory)
    return predict(adapter, denoiser, case)


# Saving for plain diffusers


def options_for(case: BackboneCase) -> dict[str, dict]:
    mixed = {"target_modules": [*case.linear_targets, adapter_for(case.build()).input_layer_name]}
    return {**LORA_OPTIONS, "mixed_names": mixed, "last_name": {"target_modules": [case.linear_targets[-1]]}}


@each_backbone
@pytest.mark.parametrize("name", [*LORA_OPTIONS, "mixed_names", "last_name"])
def test_load_lora_weights_gives_exactly_the_trained_model(case, name, tmp_path):
    adapter = adapter_for(case.build())
    base = predict(adapter, adapter.denoiser, case)
    denoiser = build_lora(adapter, **options_for(case)[name])
    adapter.check_lora(denoiser)
    adapter.save_lora(denoiser, tmp_path)
    trained = predict(adapter, denoiser, case)
    assert (trained - base).abs().max() > 1e-3

    fresh = case.build()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(predict(adapter_for(fresh), adapter_for(fresh).denoiser, case), trained)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE_NAME]


@each_backbone
def test_the_file_carries_the_conventional_names_and_the_adapter_configuration(case, tmp_path):
    saved_lora(case, tmp_path, lora_alpha=32)
    with safe_open(tmp_path / LORA_FILE_NAME, framework="pt") as file:
        keys, metadata = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    name = adapter_for(case.build()).denoiser_name
    suffixes = (".lora.down.weight", ".lora.up.weight") if name == "unet" else (".lora_A.weight", ".lora_B.weight")
    assert keys and all(key.startswith(f"{name}.") and key.endswith(suffixes) for key in keys)
    assert metadata[f"{name}.lora_alpha"] == 32 and metadata[f"{name}.r"] == 4


@each_backbone
def test_dropout_is_not_active_in_the_loaded_pipeline(case, tmp_path):
    """`load_lora_weights` adds dropout layers in train mode, so the file must not ask for any."""
    saved_lora(case, tmp_path, lora_dropout=0.5)
    pipeline = case.build()
    pipeline.load_lora_weights(tmp_path)
    first, second = (case.generate(pipeline, output_type="pt") for _ in range(2))
    assert torch.equal(first, second)


@each_backbone
def test_float32_lora_on_a_bfloat16_base_is_saved_in_float32(case, tmp_path):
    """diffusers rounds a LoRA to the dtype of the model it loads it into; nothing else is lost."""
    adapter = adapter_for(case.build())
    adapter.denoiser.to(torch.bfloat16)
    denoiser = build_lora(adapter)
    adapter.save_lora(denoiser, tmp_path)
    assert {value.dtype for value in load_file(tmp_path / LORA_FILE_NAME).values()} == {torch.float32}
    fresh = adapter_for(case.build())
    fresh.denoiser.to(torch.bfloat16)
    fresh.pipeline.load_lora_weights(tmp_path)
    loaded = predict(fresh, fresh.denoiser, case)
    torch.testing.assert_close(loaded, predict(adapter, denoiser, case), rtol=0.1, atol=0.1)
    assert torch.equal(loaded, predict(adapter, denoiser.to(torch.bfloat16), case))


@each_backbone
def test_only_the_default_adapter_is_saved(case, tmp_path):
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter)
    trained = predict(adapter, denoiser, case)
    denoiser.add_adapter("ref", LoraConfig(r=2, target_modules=list(adapter.lora_target_modules)))
    randomize(denoiser, seed=0)
    denoiser.set_adapter("default")
    assert torch.equal(predict(adapter, denoiser, case), trained) is False  # the second draw differs
    adapter.save_lora(denoiser, tmp_path)
    fresh = case.build()
    fresh.load_lora_weights(tmp_path)
    expected = predict(adapter, denoiser, case)
    assert torch.equal(predict(adapter_for(fresh), adapter_for(fresh).denoiser, case), expected)

    ref = lora_weights(denoiser, "ref")
    randomize(denoiser, seed=9)
    for key, value in lora_weights(denoiser, "ref").items():
        assert not torch.equal(value, ref[key])
    ref = lora_weights(denoiser, "ref")
    adapter.load_lora(denoiser, tmp_path)
    assert torch.equal(predict(adapter, denoiser, case), expected)
    for key, value in lora_weights(denoiser, "ref").items():
        assert torch.equal(value, ref[key])


@each_backbone
def test_a_failed_save_leaves_the_earlier_file(case, tmp_path, monkeypatch):
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter)
    adapter.save_lora(denoiser, tmp_path)
    before = (tmp_path / LORA_FILE_NAME).read_bytes()
    randomize(denoiser, seed=1)
    original = type(adapter.pipeline).save_lora_weights

    def torn(directory, **arguments):
        original(directory, **arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(adapter.pipeline), "save_lora_weights", torn)
        adapter.save_lora(denoiser, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE_NAME]
    assert (tmp_path / LORA_FILE_NAME).read_bytes() == before
    adapter.save_lora(denoiser, tmp_path)
    assert (tmp_path / LORA_FILE_NAME).read_bytes() != before


UNEXPORTABLE = {
    "pissa": (LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "bias": (LoraConfig(target_modules=["to_out.0"], bias="all"), "bias='all'"),
    "modules_to_save": (LoraConfig(target_modules=["to_q"], modules_to_save=["to_v"]), "modules_to_save"),
    "loha": (LoHaConfig(target_modules=["to_q"]), "only LoRA"),
}


@each_backbone
@pytest.mark.parametrize("name", UNEXPORTABLE)
def test_what_a_lora_file_cannot_hold_is_refused(case, name, tmp_path):
    config, message = UNEXPORTABLE[name]
    adapter = adapter_for(case.build())
    denoiser = get_peft_model(adapter.denoiser, config)
    for call in (lambda: adapter.check_lora(denoiser), lambda: adapter.save_lora(denoiser, tmp_path)):
        with pytest.raises(ConfigurationError, match=message):
            call()
    assert not list(tmp_path.iterdir())


@each_backbone
def test_plain_denoisers_and_other_adapter_names_are_refused(case, tmp_path):
    adapter = adapter_for(case.build())
    with pytest.raises(ConfigurationError, match="into a PEFT model, not a UNet2DConditionModel"):
        adapter.save_lora(adapter.denoiser, tmp_path)
    named = get_peft_model(adapter.denoiser, LoraConfig(target_modules=["to_q"]), adapter_name="mine")
    with pytest.raises(ConfigurationError, match=r"\['mine'\], but the trained one must be named 'default'"):
        adapter.save_lora(named, tmp_path)


# Resuming


@each_backbone
@pytest.mark.parametrize("name", [*LORA_OPTIONS, "mixed_names"])
def test_load_lora_restores_every_bit_in_place(case, name, tmp_path):
    adapter = adapter_for(case.build())
    adapter.denoiser.to(torch.bfloat16)
    denoiser = build_lora(adapter, **options_for(case)[name])
    expected, parameters = lora_weights(denoiser), dict(denoiser.named_parameters())
    assert {value.dtype for value in expected.values()} == {torch.float32}
    adapter.save_lora(denoiser, tmp_path)
    randomize(denoiser, seed=1)
    adapter.load_lora(denoiser, tmp_path)
    restored = lora_weights(denoiser)
    assert restored.keys() == expected.keys() and expected
    for key, value in expected.items():
        assert torch.equal(restored[key], value), key
    assert all(parameter is parameters[key] for key, parameter in denoiser.named_parameters())
    assert all(parameter.requires_grad == (".lora_" in key) for key, parameter in denoiser.named_parameters())


DIFFERENT = {
    "alpha": ({"lora_alpha": 5}, r"lora_alpha=8, but the LoRA in training has lora_alpha=5"),
    "rank": ({"r": 2}, r"r=4, but the LoRA in training has r=2"),
    "rslora": ({"use_rslora": True}, "use_rslora=False"),
    "dora": ({"use_dora": True}, "use_dora=False"),
    "fewer_targets": ({"target_modules": ["to_q"]}, "0 weights are missing .*, [0-9]+ are unknown"),
    "more_targets": ({"target_modules": "all-linear"}, "[0-9]+ weights are missing .*, 0 are unknown"),
}


@each_backbone
@pytest.mark.parametrize("name", DIFFERENT)
def test_resuming_another_lora_is_refused(case, name, tmp_path):
    options, message = DIFFERENT[name]
    saved_lora(case, tmp_path)
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter, **options)
    before = lora_weights(denoiser)
    with pytest.raises(BackboneError, match=message):
        adapter.load_lora(denoiser, tmp_path)
    for key, value in lora_weights(denoiser).items():
        assert torch.equal(value, before[key])


@each_backbone
def test_unreadable_lora_files_are_refused(case, tmp_path):
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter)
    path = tmp_path / LORA_FILE_NAME
    with pytest.raises(BackboneError, match="is missing"):
        adapter.load_lora(denoiser, tmp_path)
    adapter.save_lora(denoiser, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(BackboneError, match="cannot be read as a LoRA file"):
        adapter.load_lora(denoiser, tmp_path)
    path.write_bytes(whole)
    save_file(load_file(path), path)  # without metadata, as other tools write it
    with pytest.raises(BackboneError, match="no adapter metadata"):
        adapter.load_lora(denoiser, tmp_path)


@each_backbone
def test_a_lora_of_another_base_model_is_refused(case, tmp_path):
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter)
    adapter.save_lora(denoiser, tmp_path)
    path = tmp_path / LORA_FILE_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    key = next(iter(weights))
    weights[key] = torch.cat([weights[key]] * 2, dim=1)
    save_file(weights, path, metadata=metadata)
    with pytest.raises(BackboneError, match="another base model"):
        adapter.load_lora(denoiser, tmp_path)


# Continuing a LoRA that diffusers loaded


@each_backbone
@pytest.mark.parametrize("name", [*LORA_OPTIONS, "mixed_names"])
def test_an_injected_lora_is_adopted_without_changing_the_output(case, name, tmp_path):
    trained = saved_lora(case, tmp_path, **options_for(case)[name])
    pipeline = case.build()
    pipeline.load_lora_weights(tmp_path)
    adapter = adapter_for(pipeline)
    plain = adapter.denoiser
    denoiser = adapter.peft_denoiser().eval()
    assert isinstance(denoiser, PeftModel) and denoiser.get_base_model() is plain is adapter.denoiser
    assert list(denoiser.peft_config) == ["default"]
    assert torch.equal(predict(adapter, denoiser, case), trained)
    assert torch.equal(predict(adapter, plain, case), trained)
    with denoiser.disable_adapter():
        base = predict(adapter, denoiser, case)
    assert torch.equal(base, predict(adapter_for(case.build()), case.build().unet, case))
    assert all(parameter.requires_grad == (".lora_" in key) for key, parameter in denoiser.named_parameters())

    randomize(denoiser, seed=2)
    adapter.save_lora(denoiser, tmp_path)
    fresh = case.build()
    fresh.load_lora_weights(tmp_path)
    expected = predict(adapter, denoiser, case)
    assert torch.equal(predict(adapter_for(fresh), adapter_for(fresh).denoiser, case), expected)
    assert not torch.equal(expected, trained)


@each_backbone
def test_a_lora_file_without_metadata_is_adopted(case, tmp_path):
    """Files of other tools: diffusers takes alpha = rank, and the layers from the keys alone."""
    saved_lora(case, tmp_path, target_modules=r".*down_blocks.*\.(to_q|to_v)")
    path = tmp_path / LORA_FILE_NAME
    save_file(load_file(path), path)
    pipeline = case.build()
    pipeline.load_lora_weights(tmp_path, adapter_name="mine")
    adapter = adapter_for(pipeline)
    expected = predict(adapter, adapter.denoiser, case)
    denoiser = adapter.peft_denoiser().eval()
    assert torch.equal(predict(adapter, denoiser, case), expected)
    layers = {key.rsplit(".lora_", 1)[0] for key in lora_weights(denoiser)}
    assert len(layers) == len(load_file(path)) // 2
    adapter.save_lora(denoiser, tmp_path)
    fresh = case.build()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(predict(adapter_for(fresh), adapter_for(fresh).denoiser, case), expected)


@each_backbone
def test_a_lora_with_fewer_layers_than_its_targets_is_adopted_layer_by_layer(case, tmp_path):
    """Layers that are not in the file get no LoRA, even if the configuration in it would match them."""
    saved_lora(case, tmp_path)
    path = tmp_path / LORA_FILE_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    kept = {key: value for key, value in load_file(path).items() if "mid_block" not in key}
    assert 0 < len(kept) < len(load_file(path))
    save_file(kept, path, metadata=metadata)
    adapter = adapter_for(case.build())
    adapter.pipeline.load_lora_weights(tmp_path)
    expected = predict(adapter, adapter.denoiser, case)
    denoiser = adapter.peft_denoiser().eval()
    assert len(lora_weights(denoiser)) == len(kept)
    assert torch.equal(predict(adapter, denoiser, case), expected)
    adapter.save_lora(denoiser, tmp_path)
    fresh = adapter_for(case.build())
    fresh.pipeline.load_lora_weights(tmp_path)
    assert torch.equal(predict(fresh, fresh.denoiser, case), expected)


@each_backbone
def test_half_precision_lora_weights_become_float32(case, tmp_path):
    saved_lora(case, tmp_path)
    path = tmp_path / LORA_FILE_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    halves = {key: value.to(torch.bfloat16) for key, value in load_file(path).items()}
    save_file(halves, path, metadata=metadata)
    adapter = adapter_for(case.build())
    adapter.denoiser.to(torch.bfloat16)
    adapter.pipeline.load_lora_weights(tmp_path)
    denoiser = adapter.peft_denoiser()
    weights = lora_weights(denoiser)
    assert weights and {value.dtype for value in weights.values()} == {torch.float32}
    assert adapter.input_dtype(denoiser) == torch.bfloat16


@each_backbone
def test_a_peft_model_in_the_pipeline_is_taken_as_it_is(case):
    pipeline = case.build()
    name = adapter_for(pipeline).denoiser_name
    wrapped = build_lora(adapter_for(pipeline))
    setattr(pipeline, name, wrapped)
    adapter = adapter_for(pipeline)
    trained = predict(adapter, wrapped, case)
    assert adapter.peft_denoiser() is wrapped
    assert not isinstance(adapter.denoiser, PeftModel) and adapter.denoiser is wrapped.get_base_model()
    assert torch.equal(predict(adapter, adapter.denoiser, case), trained)
    assert len(case.generate(pipeline, output_type="pt")) == len(PROMPTS)


@each_backbone
def test_a_lora_that_cannot_be_continued_exactly_is_refused(case, tmp_path):
    saved_lora(case, tmp_path)

    def loaded():
        pipeline = case.build()
        pipeline.load_lora_weights(tmp_path, adapter_name="mine")
        return pipeline

    def refused(pipeline, message: str) -> None:
        adapter = adapter_for(pipeline)
        before = predict(adapter, adapter.denoiser, case)
        with pytest.raises(ConfigurationError, match=message):
            adapter.peft_denoiser()
        assert torch.equal(predict(adapter, adapter.denoiser, case), before)

    refused(case.build(), "has none")
    (scaled := loaded()).set_adapters("mine", 0.5)
    refused(scaled, "scaled by 0.5")
    (switched_off := loaded()).disable_lora()
    refused(switched_off, "switched off")
    (fused := loaded()).fuse_lora()
    refused(fused, "is fused")
    (two := loaded()).load_lora_weights(tmp_path, adapter_name="other")
    refused(two, r"has \['mine', 'other'\]")


@each_backbone
def test_a_lora_of_a_text_encoder_is_refused(case, tmp_path):
    saved_lora(case, tmp_path)
    pipeline = case.build()
    pipeline.load_lora_weights(tmp_path)
    pipeline.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigurationError, match="text_encoder carries a LoRA too"):
        adapter_for(pipeline).peft_denoiser()
