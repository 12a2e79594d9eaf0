# SPDX-License-Identifier: Apache-2.0
"""What is particular to Wan: prompts padded with zeros, a timestep per token, and two experts."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, WanPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.adapters.backbone_cases import PROMPTS, spied_forward
from tests.adapters.cases.wan import load_experts_lora
from tests.tiny.wan import tiny_wan, tiny_wan_experts, tiny_wan_ti2v, tiny_wan_transformer, wan_scheduler
from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.errors import BackboneError, ConfigurationError

SIZE = (16, 32, 5)
SECOND_FILE = "pytorch_lora_weights_2.safetensors"
# On both sides of 0.7, whose sigma, with a shift of 3, is the boundary: 0.875.
NOISY, CLEAN = 0.9, 0.3


def predict(adapter: BackboneAdapter, times: list[float], denoiser: nn.Module | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(times), *adapter.latent_shape(*SIZE), generator=generator)
    conditioning = adapter.collate([*adapter.encode_prompts(PROMPTS), adapter.null_conditioning()][: len(times)])
    level = adapter.noise_schedule.level_at(torch.tensor(times))
    with torch.no_grad():
        return adapter.forward(denoiser or adapter.denoiser, latents, level, conditioning)


def with_lora(adapter: BackboneAdapter, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"], "init_lora_weights": False, **options}
    return get_peft_model(adapter.denoiser, LoraConfig(**arguments))


# Every Wan


def test_prompts_are_stored_without_their_padding_and_padded_as_in_inference():
    adapter = adapter_for(tiny_wan())
    assert adapter.encode_prompts([]) == []
    items = adapter.encode_prompts(["", "a red cat"])
    assert [len(item["prompt_embeds"]) for item in items] == [1, 11]  # the end token; and a piece for each character
    expected, _ = adapter.pipeline.encode_prompt(["", "a red cat"], do_classifier_free_guidance=False)
    assert expected.shape[1] == 226
    embeds = adapter.collate(items)["prompt_embeds"]
    assert embeds.shape[1] == 512 and not embeds[:, 226:].any()
    torch.testing.assert_close(embeds[:, :226], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", [2, 4, 6, 80])
def test_frames_that_the_vae_would_drop_are_refused(frames):
    adapter = adapter_for(tiny_wan())
    below = (frames - 1) // 4 * 4 + 1
    with pytest.raises(ConfigurationError, match=f"num_frames {frames} .* Nearest valid: {below} or {below + 4}"):
        adapter.latent_shape(16, 32, frames)
    kept = adapter.decode(adapter.encode_media(torch.zeros(1, 3, frames, 16, 32))).shape[2]
    assert kept == below != frames


def test_images_are_single_frames():
    adapter = adapter_for(tiny_wan())
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = adapter.encode_media(images)
    assert latents.shape == (2, *adapter.latent_shape(16, 32)) == (2, 4, 1, 2, 4)
    assert torch.equal(latents, adapter.encode_media(images.unsqueeze(2)))
    assert adapter.decode(latents).shape == (2, 3, 1, 16, 32)


def test_every_token_of_ti2v_is_told_the_level_of_its_sample():
    adapter = adapter_for(tiny_wan_ti2v())
    assert adapter.spatial_multiple == 32 and adapter.latent_shape(32, 64, 5) == (4, 2, 2, 4)
    level = adapter.noise_schedule.level_at(torch.tensor([0.2, 0.8]))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    with spied_forward(adapter.denoiser) as calls, torch.no_grad():
        adapter.forward(adapter.denoiser, torch.zeros(2, 4, 2, 2, 4), level, conditioning)
    assert torch.equal(calls[0]["timestep"], level.timestep[:, None].expand(2, 2 * 1 * 2))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_schedule_has_the_shift_of_the_samplers_configuration(shift):
    pipeline = tiny_wan(scheduler=wan_scheduler(flow_shift=shift))
    pipeline.scheduler.set_timesteps(7)
    level = adapter_for(pipeline).noise_schedule.level_at(torch.tensor([0.5]))
    expected = shift * 0.5 / (1 + (shift - 1) * 0.5)
    torch.testing.assert_close(level.sigma_t, torch.tensor([expected]))
    torch.testing.assert_close(level.timestep, torch.tensor([expected * 1000]))


UNSUPPORTED = {
    "image_to_video": ({"transformer": {"in_channels": 9}}, "transformer takes 9 channels but the VAE's latents have"),
    "image_embedding": ({"transformer": {"image_dim": 8, "added_kv_proj_dim": 24}}, "conditioned on an image"),
    "frame_patches": ({"transformer": {"patch_size": (2, 2, 2)}}, r"patch_size=\(2, 2, 2\)"),
    "diffusion": ({"scheduler": DDIMScheduler()}, "DDIMScheduler has a beta schedule"),
    "dynamic": ({"scheduler": wan_scheduler(use_dynamic_shifting=True)}, "use_dynamic_shifting=True"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_trained_is_refused(name):
    options, message = UNSUPPORTED[name]
    if "transformer" in options:
        options = {"transformer": tiny_wan_transformer(**options["transformer"])}
    with pytest.raises(BackboneError, match=message):
        adapter_for(tiny_wan(**options))


# Two experts


def test_each_sample_goes_to_the_expert_of_its_level():
    pipeline = tiny_wan_experts()
    adapter = adapter_for(pipeline)
    mixed = predict(adapter, [CLEAN, NOISY, CLEAN])
    alone = [tiny_wan(transformer=expert) for expert in (pipeline.transformer, pipeline.transformer_2)]
    noisy, clean = (predict(adapter_for(one), [CLEAN, NOISY, CLEAN]) for one in alone)
    torch.testing.assert_close(mixed, torch.stack([clean[0], noisy[1], clean[2]]))
    assert not torch.allclose(noisy, clean, atol=1e-3)


def test_training_changes_the_expert_where_inference_does():
    pipeline = tiny_wan_experts(scheduler=wan_scheduler(flow_shift=1.0))
    adapter = adapter_for(pipeline)
    conditioning = adapter.collate([adapter.null_conditioning()])
    latents = torch.zeros(1, *adapter.latent_shape(*SIZE))

    def called(run: Callable[[], Any]) -> list[int]:
        """0 for `transformer`, 1 for `transformer_2`, in the order of calls."""
        order: list[int] = []
        experts = (pipeline.transformer, pipeline.transformer_2)
        hooks = [e.register_forward_pre_hook(lambda *_, i=i: order.append(i)) for i, e in enumerate(experts)]
        run()
        for hook in hooks:
            hook.remove()
        return order

    options: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 5, "guidance_scale": 1.0}
    inference = called(lambda: pipeline("a cat", num_inference_steps=40, output_type="latent", **options))
    assert inference == [0] * 6 + [1] * 34  # the sixth step is at timestep 875 exactly
    levels = adapter.noise_schedule.level(pipeline.scheduler.sigmas[:-1])
    assert levels.timestep[5] == pytest.approx(875.1, abs=0.1)

    def train() -> None:
        for sigma in pipeline.scheduler.sigmas[:-1]:
            level = adapter.noise_schedule.level(sigma.reshape(1))
            adapter.forward(adapter.denoiser, latents, level, conditioning)

    with torch.no_grad():
        assert called(train) == inference


def test_only_the_experts_of_the_batch_get_gradients():
    adapter = adapter_for(tiny_wan_experts())
    denoiser = with_lora(adapter)
    latents = torch.zeros(2, *adapter.latent_shape(*SIZE))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    for times, expected in (([CLEAN, NOISY], {"transformer", "transformer_2"}), ([CLEAN, 0.1], {"transformer_2"})):
        denoiser.zero_grad()
        level = adapter.noise_schedule.level_at(torch.tensor(times))
        adapter.forward(denoiser, latents, level, conditioning).square().mean().backward()
        names = {name.split(".")[2] for name, parameter in denoiser.named_parameters() if parameter.grad is not None}
        assert names == expected


@pytest.mark.parametrize("missing, kept, beyond", [("transformer_2", NOISY, CLEAN), ("transformer", CLEAN, NOISY)])
def test_one_expert_alone_takes_the_levels_on_its_side(missing, kept, beyond):
    both = adapter_for(tiny_wan_experts())
    adapter = adapter_for(tiny_wan_experts(**{missing: None}))
    torch.testing.assert_close(predict(adapter, [kept, kept]), predict(both, [kept, kept]))
    with pytest.raises(ConfigurationError, match=f"level of the {missing}, which is not loaded.*boundary is 875"):
        predict(adapter, [kept, beyond])
    with pytest.raises(ConfigurationError, match=f"Sampling needs both experts, but the {missing} is not loaded"):
        adapter.sample("a cat", 16, 32, num_frames=5, num_inference_steps=2)
    assert both.time_range == (0.0, 1.0)
    end = 0 if missing == "transformer_2" else 1
    torch.testing.assert_close(adapter.time_range[end], 0.7)
    predict(adapter, [adapter.time_range[end]])  # the boundary itself, whatever it is rounded to


def test_no_expert_at_all_is_refused():
    with pytest.raises(BackboneError, match="neither transformer nor transformer_2"):
        adapter_for(tiny_wan_experts(transformer=None, transformer_2=None))


def test_a_peft_model_around_one_expert_is_refused():
    pipeline = tiny_wan_experts()
    pipeline.transformer_2 = get_peft_model(pipeline.transformer_2, LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ConfigurationError, match="transformer_2 is a PEFT model"):
        adapter_for(pipeline)


LORAS = {
    "both": {},
    "patterns": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {r"transformer_2\..*to_v": 3}},
    "regex": {"target_modules": r"transformer_2\.blocks.*to_v|transformer\.blocks.*attn1.*to_q"},
    "first": {"target_modules": r"transformer\..*to_q"},
    "second": {"target_modules": r"transformer_2\..*to_q"},
}


@pytest.mark.parametrize("name", LORAS)
def test_each_expert_has_a_lora_file_that_plain_diffusers_loads(name, tmp_path):
    adapter = adapter_for(tiny_wan_experts())
    denoiser = with_lora(adapter, **LORAS[name])
    trained = predict(adapter, [CLEAN, NOISY, CLEAN], denoiser)
    adapter.save_lora(denoiser, tmp_path)
    first, second = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / SECOND_FILE
    assert (first.exists(), second.exists()) == (name != "second", name != "first")

    pipeline = tiny_wan_experts()
    if first.exists():
        pipeline.load_lora_weights(tmp_path)
    if second.exists():
        pipeline.load_lora_weights(tmp_path, weight_name=SECOND_FILE, load_into_transformer_2=True)
        assert all(key.startswith("transformer.blocks.") for key in load_file(second))
    loaded = predict(adapter_for(pipeline), [CLEAN, NOISY, CLEAN])
    assert torch.equal(loaded, trained)
    assert not torch.allclose(trained, predict(adapter_for(tiny_wan_experts()), [CLEAN, NOISY, CLEAN]), atol=1e-3)

    resumed = with_lora(adapter_for(tiny_wan_experts()), **{**LORAS[name], "init_lora_weights": True})
    adapter.load_lora(resumed, tmp_path)
    assert torch.equal(predict(adapter, [CLEAN, NOISY, CLEAN], resumed), trained)
    other = with_lora(adapter_for(tiny_wan_experts()), **{**LORAS[name], "lora_alpha": 7})
    with pytest.raises(BackboneError, match="alpha"):
        adapter.load_lora(other, tmp_path)


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name, kept", [("first", "pytorch_lora_weights.safetensors"), ("second", SECOND_FILE)])
def test_a_lora_of_one_expert_takes_the_place_of_one_of_both(name, kept, tmp_path, monkeypatch):
    """The other's file is of another model: loaded beside the new one, it would make a mixture of the two."""
    adapter_of_both = adapter_for(tiny_wan_experts())
    adapter_of_both.save_lora(with_lora(adapter_of_both), tmp_path)
    before = _read(tmp_path)
    assert len(before) == 2
    adapter = adapter_for(tiny_wan_experts())
    denoiser = with_lora(adapter, **LORAS[name])

    def torn(*_args: Any, **_options: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("safetensors.torch.save_file", torn)
        adapter.save_lora(denoiser, tmp_path)
    assert _read(tmp_path) == before
    adapter.save_lora(denoiser, tmp_path)
    assert _read(tmp_path).keys() == {kept}


def test_experts_trained_one_after_the_other_save_into_one_folder(tmp_path):
    first = adapter_for(tiny_wan_experts(transformer_2=None))
    first.save_lora(with_lora(first), tmp_path)
    before = _read(tmp_path)
    second = adapter_for(tiny_wan_experts(transformer=None))
    second.save_lora(with_lora(second), tmp_path)
    assert _read(tmp_path).items() >= before.items() and len(_read(tmp_path)) == 2
    adapter = adapter_for(tiny_wan_experts())
    load_experts_lora(adapter.pipeline, tmp_path)
    base = adapter_for(tiny_wan_experts())
    for time in (CLEAN, NOISY):
        assert not torch.equal(predict(adapter, [time]), predict(base, [time]))


def loaded_loras(tmp_path, **names: str) -> WanPipeline:
    """A pipeline with a LoRA in each expert, loaded by plain diffusers."""
    adapter = adapter_for(tiny_wan_experts())
    adapter.save_lora(with_lora(adapter), tmp_path)
    pipeline = tiny_wan_experts()
    if not names:
        load_experts_lora(pipeline, tmp_path)
    else:
        pipeline.load_lora_weights(tmp_path, adapter_name=names["first"])
        options = {"weight_name": SECOND_FILE, "load_into_transformer_2": True, "adapter_name": names["second"]}
        pipeline.load_lora_weights(tmp_path, **options)
    return pipeline


def test_loras_of_both_experts_are_adopted_as_one(tmp_path):
    pipeline = loaded_loras(tmp_path)
    adapter = adapter_for(pipeline)
    expected = predict(adapter, [CLEAN, NOISY, CLEAN])
    denoiser = adapter.peft_denoiser()
    assert torch.equal(predict(adapter, [CLEAN, NOISY, CLEAN], denoiser.eval()), expected)
    trained = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"transformer", "transformer_2"}
    assert all(".lora_" in name for name in trained)

    again = adapter_for(pipeline).peft_denoiser()  # as when the pipeline is given to a second trainer
    assert torch.equal(predict(adapter_for(pipeline), [CLEAN, NOISY, CLEAN], again.eval()), expected)


def test_a_lora_of_one_expert_is_adopted_without_touching_the_other(tmp_path):
    adapter = adapter_for(tiny_wan_experts())
    adapter.save_lora(with_lora(adapter, target_modules=r"transformer_2\..*to_q"), tmp_path)
    pipeline = tiny_wan_experts()
    pipeline.load_lora_weights(tmp_path, weight_name=SECOND_FILE, load_into_transformer_2=True)
    adapter = adapter_for(pipeline)
    expected = predict(adapter, [CLEAN, NOISY])
    denoiser = adapter.peft_denoiser().eval()
    assert torch.equal(predict(adapter, [CLEAN, NOISY], denoiser), expected)
    assert {name.split(".")[2] for name, p in denoiser.named_parameters() if p.requires_grad} == {"transformer_2"}


def test_loras_that_one_configuration_does_not_describe_are_refused(tmp_path):
    pipeline = loaded_loras(tmp_path, first="high", second="low")
    with pytest.raises(ConfigurationError, match=r"named \['high'\] and \['low'\].*same adapter_name"):
        adapter_for(pipeline).peft_denoiser()
    pipeline = loaded_loras(tmp_path, first="mine", second="mine")
    pipeline.transformer_2.peft_config["mine"].lora_alpha = 9
    with pytest.raises(ConfigurationError, match="lora_alpha=8 and 9"):
        adapter_for(pipeline).peft_denoiser()


def test_other_experts_can_be_installed_for_sampling():
    adapter = adapter_for(tiny_wan_experts())
    trained, reference = adapter.denoiser, copy.deepcopy(adapter.denoiser)
    options: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 4, "guidance_scale": 1.0}

    def sample() -> Tensor:
        return adapter.sample("a cat", 16, 32, **options, generator=torch.Generator().manual_seed(0))

    expected = sample()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    changed = sample()
    assert not torch.allclose(changed, expected, atol=1e-3)
    adapter.install_denoiser(get_peft_model(reference, LoraConfig(target_modules=["to_q"])))
    assert adapter.denoiser is reference
    assert torch.equal(sample(), expected)
    adapter.install_denoiser(trained)
    assert adapter.denoiser is trained and torch.equal(sample(), changed)


def test_full_weights_of_both_experts_are_saved_and_restored(tmp_path):
    adapter = adapter_for(tiny_wan_experts())
    reference = copy.deepcopy(adapter.denoiser)
    adapter.save_denoiser(adapter.denoiser, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["transformer", "transformer_2"]
    with torch.no_grad():
        for parameter in adapter.denoiser.parameters():
            parameter.add_(1)
    adapter.load_denoiser(adapter.denoiser, tmp_path)
    for name, tensor in adapter.denoiser.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name
