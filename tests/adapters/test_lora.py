# SPDX-License-Identifier: Apache-2.0
"""LoRA files: what plain diffusers loads is exactly what was trained, and training resumes to the bit.

`test_contract.py` saves and resumes one LoRA of every backbone; here are the details, on one backbone of each kind.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS
from tests.adapters.lora_kinds import (
    CASES,
    assert_same_weights,
    base_model,
    base_prediction,
    build_lora,
    each_kind,
    each_option,
    forward,
    loaded_lora,
    lora_files,
    lora_layers,
    lora_weights,
    one_and_two_files,
    options_of,
    predict,
    predict_loaded,
    randomize,
    rewrite,
    saved_lora,
)
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import BackboneError, ConfigurationError

# Saving for plain diffusers


@each_option
def test_plain_diffusers_loads_exactly_the_trained_model_and_training_continues_it(case, name, tmp_path):
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter, **options_of(case, name))
    adapter.check_lora(denoiser)
    adapter.save_lora(denoiser, tmp_path / "first")
    trained = predict(adapter, denoiser, case)
    assert (trained - base_prediction(case)).abs().max() > 1e-3
    assert len(lora_files(tmp_path / "first")) == len(case.denoisers(adapter))

    adapter = loaded_lora(case, tmp_path / "first")
    plain = adapter.denoiser
    assert torch.equal(predict(adapter, plain, case), trained)
    denoiser = adapter.peft_denoiser().eval()
    assert isinstance(denoiser, PeftModel) and denoiser.get_base_model() is plain is adapter.denoiser
    assert list(denoiser.peft_config) == ["default"]
    assert torch.equal(predict(adapter, denoiser, case), trained)
    assert torch.equal(predict(adapter, plain, case), trained)
    with denoiser.disable_adapter():
        assert torch.equal(predict(adapter, denoiser, case), base_prediction(case))
    assert all(parameter.requires_grad == (".lora_" in key) for key, parameter in denoiser.named_parameters())

    adapter.save_lora(denoiser, tmp_path / "again")
    for saved, again in zip(lora_files(tmp_path / "first"), lora_files(tmp_path / "again"), strict=True):
        assert_same_weights(load_file(again), load_file(saved))
    randomize(denoiser, seed=2)
    adapter.save_lora(denoiser, tmp_path / "again")
    continued = predict(adapter, denoiser, case)
    assert torch.equal(predict_loaded(case, tmp_path / "again"), continued)
    assert not torch.equal(continued, trained)


@each_kind
def test_the_file_carries_the_conventional_names_and_the_adapter_configuration(case, tmp_path):
    """Those of a U-Net have names of their own; that of a second expert has the names of the first."""
    saved_lora(case, tmp_path, lora_alpha=32)
    name = base_model(case).denoiser_name
    suffixes = (".lora.down.weight", ".lora.up.weight") if name == "unet" else (".lora_A.weight", ".lora_B.weight")
    for path in lora_files(tmp_path):
        with safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
        assert keys and all(key.startswith(f"{name}.") and key.endswith(suffixes) for key in keys)
        assert metadata[f"{name}.lora_alpha"] == 32 and metadata[f"{name}.r"] == 4


@each_kind
def test_dropout_is_not_active_in_the_loaded_pipeline(case, tmp_path):
    """diffusers adds dropout layers in train mode, so the file must not ask for any."""
    saved_lora(case, tmp_path, lora_dropout=0.5)
    pipeline = loaded_lora(case, tmp_path).pipeline
    first, second = (case.generate(pipeline, output_type="pt") for _ in range(2))
    assert torch.equal(first, second)


@each_kind
def test_float32_lora_on_a_bfloat16_base_is_saved_in_float32(case, tmp_path):
    """diffusers rounds a LoRA to the dtype of the model it loads it into; nothing else is lost."""
    adapter = adapter_for(case.build())
    adapter.denoiser.to(torch.bfloat16)
    denoiser = build_lora(adapter)
    adapter.save_lora(denoiser, tmp_path)
    for path in lora_files(tmp_path):
        assert {value.dtype for value in load_file(path).values()} == {torch.float32}
    pipeline = case.build()
    adapter_for(pipeline).denoiser.to(torch.bfloat16)
    case.load_lora(pipeline, tmp_path)
    fresh = adapter_for(pipeline)
    loaded = predict(fresh, fresh.denoiser, case)
    torch.testing.assert_close(loaded, predict(adapter, denoiser, case), rtol=0.1, atol=0.1)
    assert torch.equal(loaded, predict(adapter, denoiser.to(torch.bfloat16), case))


@each_kind
def test_only_the_default_adapter_is_saved(case, tmp_path):
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter)
    trained = predict(adapter, denoiser, case)
    denoiser.add_adapter("ref", LoraConfig(r=2, target_modules=denoiser.peft_config["default"].target_modules))
    randomize(denoiser, seed=0)
    denoiser.set_adapter("default")
    assert torch.equal(predict(adapter, denoiser, case), trained) is False  # the second draw differs
    adapter.save_lora(denoiser, tmp_path)
    expected = predict(adapter, denoiser, case)
    assert torch.equal(predict_loaded(case, tmp_path), expected)

    ref = lora_weights(denoiser, "ref")
    randomize(denoiser, seed=9)
    for key, value in lora_weights(denoiser, "ref").items():
        assert not torch.equal(value, ref[key])
    ref = lora_weights(denoiser, "ref")
    adapter.load_lora(denoiser, tmp_path)
    assert torch.equal(predict(adapter, denoiser, case), expected)
    for key, value in lora_weights(denoiser, "ref").items():
        assert torch.equal(value, ref[key])


@each_kind
def test_a_failed_save_leaves_the_earlier_files(case, tmp_path, monkeypatch):
    """Both of two experts: one file of this save and one of the last would be a model that never was."""
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter)
    adapter.save_lora(denoiser, tmp_path)
    before = [path.read_bytes() for path in lora_files(tmp_path)]
    randomize(denoiser, seed=1)
    written = []

    def torn(weights, path, **options):
        save_file(weights, path, **options)
        written.append(path)
        if len(written) == len(before):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(safetensors.torch, "save_file", torn)
        adapter.save_lora(denoiser, tmp_path)
    assert len(written) == len(before)
    assert [path.read_bytes() for path in lora_files(tmp_path)] == before
    adapter.save_lora(denoiser, tmp_path)
    for path, earlier in zip(lora_files(tmp_path), before, strict=True):
        assert path.read_bytes() != earlier


UNEXPORTABLE = {
    "pissa": (LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "bias": (LoraConfig(target_modules=["to_out.0"], bias="all"), "bias='all'"),
    "modules_to_save": (LoraConfig(target_modules=["to_q"], modules_to_save=["to_v"]), "modules_to_save"),
    "loha": (LoHaConfig(target_modules=["to_q"]), "only LoRA"),
}


@one_and_two_files
@pytest.mark.parametrize("name", UNEXPORTABLE)
def test_what_a_lora_file_cannot_hold_is_refused(case, name, tmp_path):
    config, message = UNEXPORTABLE[name]
    adapter = adapter_for(case.build())
    denoiser = get_peft_model(adapter.denoiser, config)
    for call in (lambda: adapter.check_lora(denoiser), lambda: adapter.save_lora(denoiser, tmp_path)):
        with pytest.raises(ConfigurationError, match=message):
            call()
    assert not list(tmp_path.iterdir())


@each_kind
def test_plain_denoisers_and_other_adapter_names_are_refused(case, tmp_path):
    adapter = adapter_for(case.build())
    with pytest.raises(ConfigurationError, match=f"into a PEFT model, not a {type(adapter.denoiser).__name__}"):
        adapter.save_lora(adapter.denoiser, tmp_path)
    named = get_peft_model(adapter.denoiser, LoraConfig(target_modules=["to_q"]), adapter_name="mine")
    with pytest.raises(ConfigurationError, match=r"\['mine'\], but the trained one must be named 'default'"):
        adapter.save_lora(named, tmp_path)


# Resuming


@each_option
def test_load_lora_restores_every_bit_in_place(case, name, tmp_path):
    adapter = adapter_for(case.build())
    adapter.denoiser.to(torch.bfloat16)
    denoiser = build_lora(adapter, **options_of(case, name))
    expected, parameters = lora_weights(denoiser), dict(denoiser.named_parameters())
    assert {value.dtype for value in expected.values()} == {torch.float32}
    adapter.save_lora(denoiser, tmp_path)
    randomize(denoiser, seed=1)
    adapter.load_lora(denoiser, tmp_path)
    assert_same_weights(lora_weights(denoiser), expected)
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


@one_and_two_files
@pytest.mark.parametrize("name", DIFFERENT)
def test_resuming_another_lora_is_refused(case, name, tmp_path):
    options, message = DIFFERENT[name]
    saved_lora(case, tmp_path)
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter, **options)
    before = lora_weights(denoiser)
    with pytest.raises(BackboneError, match=message):
        adapter.load_lora(denoiser, tmp_path)
    assert_same_weights(lora_weights(denoiser), before)


@each_kind
def test_unreadable_lora_files_are_refused(case, tmp_path):
    """Each of two experts' files, before anything of the other is restored."""
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter)
    adapter.save_lora(denoiser, tmp_path)
    randomize(denoiser, seed=1)
    before = lora_weights(denoiser)

    def refused(message: str) -> None:
        with pytest.raises(BackboneError, match=message):
            adapter.load_lora(denoiser, tmp_path)
        assert_same_weights(lora_weights(denoiser), before)

    for path in lora_files(tmp_path):
        whole = path.read_bytes()
        path.unlink()
        refused(f"{path.name} is missing")
        path.write_bytes(whole[:-10])
        refused(f"{path.name} cannot be read as a LoRA file")
        path.write_bytes(whole)
        rewrite(path, lambda weights: weights, keep_metadata=False)  # as other tools write it
        refused(f"{path.name} has no adapter metadata")
        path.write_bytes(whole)
    adapter.load_lora(denoiser, tmp_path)


@each_kind
def test_a_lora_of_another_base_model_is_refused(case, tmp_path):
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter)
    adapter.save_lora(denoiser, tmp_path)
    randomize(denoiser, seed=1)
    before = lora_weights(denoiser)

    def widen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        key = next(iter(weights))
        return {**weights, key: torch.cat([weights[key]] * 2, dim=1)}

    rewrite(lora_files(tmp_path)[-1], widen)
    with pytest.raises(BackboneError, match="another base model"):
        adapter.load_lora(denoiser, tmp_path)
    assert_same_weights(lora_weights(denoiser), before)


# Continuing a LoRA that diffusers loaded


UNUSED_IN_SD3 = "transformer_blocks.1.attn.add_q_proj"  # the last block drops what its text tokens would gather


@each_kind
def test_training_continues_every_layer_of_an_adopted_lora(case, tmp_path):
    saved_lora(case, tmp_path)
    adapter = loaded_lora(case, tmp_path)
    denoiser = adapter.peft_denoiser()
    before = lora_weights(denoiser)
    parts = case.denoisers(adapter)
    assert all(lora_layers(part) for part in parts)
    assert sum(len(lora_layers(part)) for part in parts) == len(lora_layers(denoiser))

    optimizer = torch.optim.SGD([p for p in denoiser.parameters() if p.requires_grad], lr=0.1)
    forward(adapter, denoiser, case).square().mean().backward()
    optimizer.step()
    unchanged = {key for key, value in lora_weights(denoiser).items() if torch.equal(value, before[key])}
    assert unchanged == {key for key in before if case.name == "sd3" and UNUSED_IN_SD3 in key}
    adapter.save_lora(denoiser, tmp_path)
    assert torch.equal(predict_loaded(case, tmp_path), predict(adapter, denoiser.eval(), case))


@each_kind
def test_a_lora_file_without_metadata_is_adopted(case, tmp_path):
    """Files of other tools: diffusers takes alpha = rank, and the layers from the keys alone."""
    some = lora_layers(build_lora(adapter_for(case.build())).get_base_model())[::3]  # not all of any kind
    saved_lora(case, tmp_path, target_modules="|".join(map(re.escape, some)))
    for path in lora_files(tmp_path):
        rewrite(path, lambda weights: weights, keep_metadata=False)
    adapter = loaded_lora(case, tmp_path, adapter_name="mine")
    expected = predict(adapter, adapter.denoiser, case)
    denoiser = adapter.peft_denoiser().eval()
    assert torch.equal(predict(adapter, denoiser, case), expected)
    assert lora_layers(denoiser.get_base_model()) == some
    adapter.save_lora(denoiser, tmp_path)
    assert torch.equal(predict_loaded(case, tmp_path), expected)


@each_kind
def test_a_lora_with_fewer_layers_than_its_targets_is_adopted_layer_by_layer(case, tmp_path):
    """Layers that are not in the file get no LoRA, even if the configuration in it would match them."""
    saved_lora(case, tmp_path)

    def without_the_first_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        first = min(weights).split(".lora")[0]
        return {key: value for key, value in weights.items() if not key.startswith(f"{first}.lora")}

    number = 0
    for path in lora_files(tmp_path):
        whole = load_file(path)
        rewrite(path, without_the_first_layer)
        assert len(load_file(path)) == len(whole) - 2 > 0
        number += len(load_file(path))
    adapter = loaded_lora(case, tmp_path)
    expected = predict(adapter, adapter.denoiser, case)
    denoiser = adapter.peft_denoiser().eval()
    assert len(lora_weights(denoiser)) == number
    assert torch.equal(predict(adapter, denoiser, case), expected)
    adapter.save_lora(denoiser, tmp_path)
    assert torch.equal(predict_loaded(case, tmp_path), expected)


@each_kind
def test_half_precision_lora_weights_become_float32(case, tmp_path):
    saved_lora(case, tmp_path)
    for path in lora_files(tmp_path):
        rewrite(path, lambda weights: {key: value.to(torch.bfloat16) for key, value in weights.items()})
    pipeline = case.build()
    adapter_for(pipeline).denoiser.to(torch.bfloat16)
    case.load_lora(pipeline, tmp_path)
    adapter = adapter_for(pipeline)
    denoiser = adapter.peft_denoiser()
    weights = lora_weights(denoiser)
    assert weights and {value.dtype for value in weights.values()} == {torch.float32}
    assert adapter.input_dtype(denoiser) == torch.bfloat16


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if name != "wan22_a14b"])
def test_a_peft_model_in_the_pipeline_is_taken_as_it_is(case):
    """Of two experts it is refused: see `test_wan.py`."""
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


@each_kind
def test_a_lora_that_cannot_be_continued_exactly_is_refused(case, tmp_path):
    """Of two experts, even if only the second is the one."""
    saved_lora(case, tmp_path)

    def refused(message: str, change: Callable[[Any], object], way_out: Callable[[Any], object]) -> None:
        adapter = loaded_lora(case, tmp_path, adapter_name="mine")
        whole = predict(adapter, adapter.denoiser, case)
        denoiser = case.denoisers(adapter)[-1]
        change(denoiser)
        before = predict(adapter, adapter.denoiser, case)
        with pytest.raises(ConfigurationError, match=message):
            adapter.peft_denoiser()
        assert torch.equal(predict(adapter, adapter.denoiser, case), before)
        way_out(denoiser)
        continued = predict(adapter, adapter.peft_denoiser().eval(), case)
        torch.testing.assert_close(continued, whole, rtol=1e-4, atol=1e-5)

    refused(
        r"scaled by 0.5 .*set_adapters\('mine', 1.0\)",
        lambda denoiser: denoiser.set_adapters("mine", 0.5),
        lambda denoiser: denoiser.set_adapters("mine", 1.0),
    )
    refused(
        r"switched off: call enable_lora\(\) and set_adapters\('mine'\)",
        lambda denoiser: denoiser.disable_lora(),
        lambda denoiser: (denoiser.enable_lora(), denoiser.set_adapters("mine")),
    )
    refused(
        r"is fused: call unfuse_lora\(\)",
        lambda denoiser: denoiser.fuse_lora(),
        lambda denoiser: denoiser.unfuse_lora(),
    )
    two = loaded_lora(case, tmp_path, adapter_name="mine")
    case.load_lora(two.pipeline, tmp_path, adapter_name="other")
    with pytest.raises(ConfigurationError, match=r"has \['mine', 'other'\]"):
        two.peft_denoiser()
    with pytest.raises(ConfigurationError, match="has none"):
        base_model(case).peft_denoiser()


@each_kind
def test_a_lora_of_a_text_encoder_is_refused(case, tmp_path):
    saved_lora(case, tmp_path)
    adapter = loaded_lora(case, tmp_path)
    name = [name for name in adapter.frozen_names if name.startswith("text_encoder")][-1]
    getattr(adapter.pipeline, name).add_adapter(LoraConfig(target_modules=r".*\.(q|q_proj)"))
    with pytest.raises(ConfigurationError, match=f"{name} carries a LoRA too"):
        adapter.peft_denoiser()
