# SPDX-License-Identifier: Apache-2.0
"""What every adapter owes: training calls the denoiser as inference does, and what is saved is what was trained."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.adapters.backbone_cases import BACKBONES, CASES, PROMPTS, BackboneCase, spied_forward
from trl_sipo.adapters import ADAPTERS, adapter_for, load_pipeline
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.parameterization import PREDICTION_TYPES, prediction_target
from trl_sipo.errors import BackboneError, ConfigurationError

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_backbone = pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case.name)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def media(case: BackboneCase, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, *case.media_shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents_for(adapter: BackboneAdapter, case: BackboneCase, batch: int = len(PROMPTS), seed: int = 0) -> Tensor:
    return randn(batch, *adapter.latent_shape(*case.media_shape[-2:]), seed=seed)


def level_of_call(adapter: BackboneAdapter, timestep: Tensor, batch: int = len(PROMPTS)) -> NoiseLevel:
    """The noise level at which inference called the denoiser."""
    return adapter.noise_schedule.level(timestep.expand(batch).long())


def loss_and_gradients(adapter: BackboneAdapter, denoiser: nn.Module, case: BackboneCase) -> tuple[Tensor, dict]:
    """Mean squared prediction at one noise level, and the gradients of everything trainable."""
    level = adapter.noise_schedule.level_at(torch.tensor([0.3, 0.8]))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    denoiser.zero_grad()
    prediction = adapter.forward(denoiser, latents_for(adapter, case), level, conditioning)
    loss = prediction.float().square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}


def trained_lora(adapter: BackboneAdapter, **options) -> nn.Module:
    """A PEFT model whose LoRA does something."""
    torch.manual_seed(1)
    arguments = {"r": 4, "target_modules": list(adapter.lora_target_modules), "init_lora_weights": False, **options}
    return get_peft_model(adapter.denoiser, LoraConfig(**arguments))


# Prompts


@each_backbone
def test_conditioning_of_a_prompt_does_not_depend_on_the_others(case):
    adapter = adapter_for(case.build())
    alone = [adapter.encode_prompts([prompt])[0] for prompt in PROMPTS]
    together = adapter.encode_prompts(PROMPTS)
    assert len(together) == 2
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys() and one
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)
    assert not torch.equal(*(next(iter(item.values())) for item in together))


@each_backbone
def test_conditioning_has_no_graph_and_owns_its_memory(case):
    pipeline = case.build()
    for name in adapter_for(pipeline).frozen_names:
        getattr(pipeline, name).requires_grad_(True)
    for item in adapter_for(pipeline).encode_prompts(PROMPTS):
        for tensor in item.values():
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@each_backbone
def test_collate_adds_the_batch_dimension(case):
    adapter = adapter_for(case.build())
    items = [*adapter.encode_prompts(PROMPTS), adapter.null_conditioning()]
    batch = adapter.collate(items)
    for key, tensor in batch.items():
        assert tensor.shape[0] == 3
        for row, item in zip(tensor, items, strict=True):
            assert torch.equal(row, item[key])


@each_backbone
def test_null_conditioning_is_the_empty_prompt_of_inference(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    batch = adapter.collate([adapter.null_conditioning()] * 2)
    adapter_calls = _forward_calls(adapter, case, batch)
    with spied_forward(adapter.denoiser) as calls:
        pipeline(["", ""], num_inference_steps=1, generator=torch.Generator().manual_seed(0), **case.call_options)
    _assert_same_arguments(adapter_calls[0], calls[0], ignore={case.latents_argument, "timestep", "return_dict"})


def _forward_calls(adapter: BackboneAdapter, case: BackboneCase, conditioning: dict) -> list[dict]:
    level = adapter.noise_schedule.level_at(torch.tensor([0.5, 0.5]))
    with spied_forward(adapter.denoiser) as calls, torch.no_grad():
        adapter.forward(adapter.denoiser, latents_for(adapter, case), level, conditioning)
    return calls


# The denoiser


@each_case
def test_training_gives_the_denoiser_what_inference_gives_it(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    with spied_forward(adapter.denoiser) as inference:
        case.generate(pipeline, steps=2)
    steps = {int(call["timestep"]): call for call in inference}
    assert len(steps) >= 2

    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    for call in steps.values():
        level = level_of_call(adapter, call["timestep"])
        with spied_forward(adapter.denoiser) as training, torch.no_grad():
            adapter.forward(adapter.denoiser, call[case.latents_argument], level, conditioning)
        _assert_same_arguments(training[0], call)


def _assert_same_arguments(actual: dict, expected: dict, ignore: set[str] = frozenset()) -> None:
    assert actual.keys() == expected.keys()
    for name in actual.keys() - ignore:
        if isinstance(actual[name], Tensor):
            value = expected[name].expand_as(actual[name])  # inference gives one timestep for the batch
            torch.testing.assert_close(actual[name], value, rtol=0, atol=0, check_dtype=name != "timestep", msg=name)
        else:
            assert actual[name] == expected[name], name


@each_case
def test_perfect_prediction_stays_on_the_path_of_the_pipelines_own_sampler(case):
    """If the target is right, a denoiser that knows x_0 and eps keeps inference on x_t = alpha_t x_0 + sigma_t eps."""
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    clean, noise = latents_for(adapter, case, seed=1), latents_for(adapter, case, seed=2)
    errors = []

    def oracle(call: dict) -> Tensor:
        level = level_of_call(adapter, call["timestep"])
        expected = level.add_noise(clean, noise)
        # Samplers start from pure noise where training ends at the last timestep; the path begins with the first step.
        errors.append((call[case.latents_argument] - expected).abs().max().item())
        return prediction_target(clean, noise, level, adapter.prediction_type)

    steps = 5
    pipeline.scheduler.set_timesteps(steps)
    first = level_of_call(adapter, pipeline.scheduler.timesteps[0])
    start = first.add_noise(clean, noise)
    if type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler":  # its latents are x_t / alpha_t
        start = start / first.alpha_t[0] / pipeline.scheduler.init_noise_sigma
    with spied_forward(adapter.denoiser, oracle):
        case.generate(pipeline, steps=steps, latents=start, output_type="latent")
    assert len(errors) >= steps
    assert max(errors) < 2e-5


@each_backbone
def test_prediction_has_the_shape_of_the_latents_and_depends_on_every_input(case):
    adapter = adapter_for(case.build())
    latents = latents_for(adapter, case)
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    low, high = (adapter.noise_schedule.level_at(torch.full((2,), time)) for time in (0.1, 0.9))
    swapped = {key: value.flip(0) for key, value in conditioning.items()}
    with torch.no_grad():
        prediction = adapter.forward(adapter.denoiser, latents, low, conditioning)
        assert prediction.shape == latents.shape and prediction.isfinite().all()
        for other in (
            adapter.forward(adapter.denoiser, latents, high, conditioning),
            adapter.forward(adapter.denoiser, latents, low, swapped),
            adapter.forward(adapter.denoiser, latents + 0.1, low, conditioning),
        ):
            assert not torch.allclose(prediction, other, atol=1e-6)


@each_backbone
def test_float32_lora_on_a_bfloat16_base(case):
    """The inputs take the base's dtype, even when the first parameter that PEFT lists is a float32 one."""
    adapter = adapter_for(case.build())
    adapter.denoiser.to(torch.bfloat16)
    targets = [*adapter.lora_target_modules, adapter.input_layer_name]
    denoiser = trained_lora(adapter, target_modules=targets)
    assert adapter.input_dtype(denoiser) == adapter.input_dtype(adapter.denoiser) == torch.bfloat16

    with spied_forward(adapter.denoiser) as calls:
        loss, gradients = loss_and_gradients(adapter, denoiser, case)
    floats = [value for value in calls[0].values() if isinstance(value, Tensor) and value.is_floating_point()]
    assert len(floats) >= 2 and {value.dtype for value in floats} == {torch.bfloat16}
    assert loss.isfinite()
    assert len(gradients) == sum(p.requires_grad for p in denoiser.parameters()) > 0
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and "lora_" in name
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0


@each_backbone
def test_the_input_dtype_of_quantised_weights_is_that_of_the_rest(case):
    adapter = adapter_for(case.build())
    adapter.denoiser.to(torch.bfloat16)
    layer = adapter.denoiser.get_submodule(adapter.input_layer_name)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    assert adapter.input_dtype(adapter.denoiser) == torch.bfloat16


@each_backbone
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compiled"]
)
def test_wrapped_denoisers_are_seen_through(case, wrap, tmp_path):
    adapter = adapter_for(case.build())
    denoiser = trained_lora(adapter)
    wrapped = wrap(denoiser)
    assert adapter.input_dtype(wrapped) == torch.float32
    adapter.enable_gradient_checkpointing(wrapped)
    assert adapter.denoiser.is_gradient_checkpointing
    adapter.save_lora(wrapped, tmp_path)
    adapter.load_lora(wrapped, tmp_path)


@each_backbone
@pytest.mark.parametrize("with_lora", [True, False], ids=["lora", "full"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(case, with_lora):
    adapter = adapter_for(case.build())
    denoiser = trained_lora(adapter) if with_lora else adapter.denoiser
    loss, gradients = loss_and_gradients(adapter, denoiser, case)
    adapter.enable_gradient_checkpointing(denoiser)
    runs = _count_calls(_checkpointed_block(adapter.denoiser))
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(adapter, denoiser, case)
    assert runs == [1, 1], "the block must run again in the backward pass"
    assert torch.equal(loss, checkpointed_loss)
    assert gradients.keys() == checkpointed_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, rtol=1e-5, atol=1e-7)


def _checkpointed_block(denoiser: nn.Module) -> nn.Module:
    """The first block that is recomputed as a whole."""
    return next(m for m in denoiser.modules() if type(m).__name__.endswith(("ResnetBlock2D", "TransformerBlock")))


def _count_calls(module: nn.Module) -> list[int]:
    runs: list[int] = []
    module.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


# Media


@each_backbone
def test_the_pipelines_decode_undoes_encode_media(case):
    """Latents put into the pipeline's last step come out as the VAE's own reconstruction; 10 % off does not."""
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    pixels = media(case)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        expected = (pipeline.vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)

    def inference_with(latents: Tensor) -> Tensor:
        def inject(_pipeline, step: int, _timestep, tensors: dict) -> dict:
            return {"latents": latents} if step == 1 else tensors

        return case.generate(pipeline, steps=2, output_type="pt", callback_on_step_end=inject)

    latents = adapter.encode_media(pixels)
    torch.testing.assert_close(inference_with(latents), expected, rtol=0, atol=5e-6)
    assert (inference_with(latents * 1.1) - expected).abs().max() > 1e-3
    torch.testing.assert_close(adapter.decode(latents), expected * 2 - 1, rtol=0, atol=1e-5)


@each_backbone
def test_encode_media_samples_the_posterior_with_the_given_noise(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    pixels = media(case)
    mean = adapter.encode_media(pixels)
    assert mean.shape == (2, *adapter.latent_shape(*case.media_shape[-2:])) and mean.dtype == torch.float32
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    noise = randn(*mean.shape, seed=3)
    sampled = adapter.encode_media(pixels, noise=noise)
    assert torch.equal(adapter.encode_media(pixels, noise=torch.zeros_like(noise)), mean)
    unit = adapter.normalize_latents(torch.ones_like(mean)) - adapter.normalize_latents(torch.zeros_like(mean))
    torch.testing.assert_close(sampled - mean, posterior.std * noise * unit, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(adapter.denormalize_latents(mean), posterior.mean, rtol=1e-5, atol=1e-6)


@each_backbone
def test_a_large_batch_is_encoded_and_decoded_in_slices(case):
    adapter = adapter_for(case.build())
    batch = 2 * adapter.vae_slice_size + 1
    pixels = media(case, batch)
    with spied_forward(adapter.pipeline.vae.encoder) as calls:
        latents = adapter.encode_media(pixels)
    assert [len(call["sample"]) for call in calls] == [adapter.vae_slice_size] * 2 + [1]
    decoded = adapter.decode(latents)
    assert latents.shape[0] == decoded.shape[0] == batch
    for index in (0, batch - 1):
        torch.testing.assert_close(latents[index], adapter.encode_media(pixels[index : index + 1])[0])
        torch.testing.assert_close(decoded[index], adapter.decode(latents[index : index + 1])[0])


@each_backbone
def test_frozen_parts_keep_their_own_dtype_inside_autocast(case):
    adapter = adapter_for(case.build())
    pixels = media(case)
    latents = latents_for(adapter, case)

    def encoded_and_decoded() -> tuple:
        return adapter.encode_media(pixels), adapter.encode_prompts(PROMPTS)[0], adapter.decode(latents)

    outside = encoded_and_decoded()
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoded_and_decoded()
    assert torch.equal(outside[0], inside[0]) and torch.equal(outside[2], inside[2])
    for key in outside[1]:
        assert torch.equal(outside[1][key], inside[1][key])


@each_backbone
def test_a_half_precision_vae_gives_float32_latents(case):
    adapter = adapter_for(case.build())
    expected = adapter.encode_media(media(case))
    adapter.pipeline.vae.to(torch.bfloat16)
    latents = adapter.encode_media(media(case))
    assert latents.dtype == adapter.decode(latents).dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=0.05, atol=0.02)


@each_backbone
def test_freeze_leaves_the_denoiser_alone(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    adapter.denoiser.train()
    for name in adapter.frozen_names:
        getattr(pipeline, name).train()
    adapter.freeze()
    for name in adapter.frozen_names:
        module = getattr(pipeline, name)
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())
    assert adapter.denoiser.training and all(p.requires_grad for p in adapter.denoiser.parameters())


@each_backbone
def test_sizes_are_checked_with_the_nearest_valid_ones(case):
    adapter = adapter_for(case.build())
    multiple = adapter.spatial_multiple
    adapter.validate_size(3 * multiple, 5 * multiple)
    with pytest.raises(ConfigurationError, match=rf"width {4 * multiple + 1} .* {4 * multiple} or {5 * multiple}"):
        adapter.validate_size(4 * multiple, 4 * multiple + 1)
    with pytest.raises(ConfigurationError, match=rf"height 0 .*Nearest valid: {multiple}\."):
        adapter.latent_shape(0, multiple)
    adapter.validate_size(adapter.default_resolution, adapter.default_resolution)
    assert case.generate(adapter.pipeline, output_type="pt").shape[-2:] == (adapter.default_resolution,) * 2


# Saving


@each_backbone
def test_a_saved_pipeline_is_the_trained_one(case, tmp_path):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    with torch.no_grad():
        for parameter in adapter.denoiser.parameters():
            parameter.mul_(1.05)
    adapter.save_pipeline(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipeline) and type(adapter_for(loaded)) is type(adapter)
    expected = case.generate(pipeline, output_type="pt")
    torch.testing.assert_close(case.generate(loaded, output_type="pt"), expected, rtol=0, atol=3e-6)
    assert not torch.allclose(case.generate(case.build(), output_type="pt"), expected, atol=1e-4)


@each_backbone
def test_load_denoiser_restores_the_weights_in_place(case, tmp_path):
    adapter = adapter_for(case.build())
    adapter.save_pipeline(tmp_path)
    saved = copy.deepcopy(adapter.denoiser.state_dict())
    parameters = list(adapter.denoiser.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)
    adapter.load_denoiser(nn.DataParallel(adapter.denoiser), tmp_path)
    assert all(one is other for one, other in zip(parameters, adapter.denoiser.parameters(), strict=True))
    for name, tensor in adapter.denoiser.state_dict().items():
        assert torch.equal(tensor, saved[name]), name

    with pytest.raises(BackboneError, match="is missing"):
        adapter.load_denoiser(adapter.denoiser, tmp_path / "nowhere")
    layer = adapter.denoiser.get_submodule(adapter.input_layer_name)
    layer.weight = nn.Parameter(layer.weight[:, :1].detach())
    with pytest.raises(BackboneError, match="does not fit"):
        adapter.load_denoiser(adapter.denoiser, tmp_path)


@each_backbone
def test_a_pipeline_with_lora_layers_is_not_saved_whole(case, tmp_path):
    adapter = adapter_for(case.build())
    trained_lora(adapter)
    with pytest.raises(ConfigurationError, match="save_lora"):
        adapter.save_pipeline(tmp_path)
    assert not list(tmp_path.iterdir())


# The table


@each_case
def test_class_facts_hold_for_the_pipeline(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    assert adapter.pipeline_class_name == type(pipeline).__name__
    assert adapter.prediction_type in PREDICTION_TYPES
    assert adapter.denoiser is getattr(pipeline, adapter.denoiser_name)
    names = [name for name, module in adapter.denoiser.named_modules() if isinstance(module, nn.Linear)]
    for target in adapter.lora_target_modules:
        assert any(name.endswith(f".{target}") for name in names), target


def test_every_adapter_of_the_table_has_a_case():
    covered = {type(case.build()).__name__ for case in BACKBONES}
    assert covered == set(ADAPTERS)
    for class_name in ADAPTERS:
        adapter = adapter_for(next(p for case in BACKBONES if type(p := case.build()).__name__ == class_name))
        assert adapter.pipeline_class_name == class_name


@each_backbone
def test_a_missing_component_is_named(case):
    facts = adapter_for(case.build())
    for name in (facts.denoiser_name, *facts.frozen_names, *facts.tokenizer_names, "scheduler"):
        pipeline = case.build()
        setattr(pipeline, name, None)
        with pytest.raises(BackboneError, match=f"has no {name}"):
            adapter_for(pipeline)
