# SPDX-License-Identifier: Apache-2.0
"""What every adapter owes: training calls the denoiser as inference does, and what is saved is what was trained."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tests.adapters.backbone_cases import (
    BACKBONES,
    CASES,
    PROMPTS,
    BackboneCase,
    first_latents,
    integer_level_of_call,
    sampler_level_of_call,
    spied_forward,
)
from tests.adapters.contract import each_backbone, each_case, latents_for, trained_lora
from trl_sipo.adapters import ADAPTERS, adapter_for, load_pipeline
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.parameterization import PREDICTION_TYPES, prediction_target
from trl_sipo.errors import BackboneError, ConfigurationError

FLOW_CASES = [case for case in CASES if case.level_of_call is not integer_level_of_call]


def loss_and_gradients(adapter: BackboneAdapter, denoiser: nn.Module, case: BackboneCase) -> tuple[Tensor, dict]:
    """Mean squared prediction at one noise level, and the gradients of everything trainable."""
    level = adapter.noise_schedule.level_at(torch.tensor([0.3, 0.8]))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    denoiser.zero_grad()
    prediction = adapter.forward(denoiser, latents_for(adapter, case), level, conditioning)
    loss = prediction.float().square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}


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
    for module in adapter_for(pipeline).frozen_modules():
        module.requires_grad_(True)
    for item in adapter_for(pipeline).encode_prompts(PROMPTS):
        for tensor in item.values():
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@each_backbone
def test_text_encoders_in_train_mode_give_the_same_conditioning(case):
    """Dropout, in whatever mode the modules were left, is none of inference's."""
    adapter = adapter_for(case.build())
    prompts = [*PROMPTS, 'a sign that says "open"']
    expected = adapter.encode_prompts(prompts)
    names = [name for name in adapter.frozen_names if name.startswith("text_encoder")]
    encoders = {name: module for name in names if (module := getattr(adapter.pipeline, name)) is not None}
    modes: dict[str, bool] = {}

    def drop_half(name: str, embedding: nn.Module, output: Tensor) -> Tensor:
        modes[name] = embedding.training
        return nn.functional.dropout(output, 0.5, embedding.training)

    for name, encoder in encoders.items():
        encoder.train()
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, _, output, name=name: drop_half(name, module, output))
    for item, other in zip(adapter.encode_prompts(prompts), expected, strict=True):
        for key in other:
            assert torch.equal(item[key], other[key]), key
    assert modes == dict.fromkeys(encoders, False)


@each_backbone
def test_collate_adds_the_batch_dimension_and_pads_with_zeros(case):
    adapter = adapter_for(case.build())
    items = [*adapter.encode_prompts(PROMPTS), adapter.null_conditioning()]
    batch = adapter.collate(items)
    assert batch.keys() >= items[0].keys()
    for tensor in batch.values():
        assert tensor.shape[0] == 3
    for key in items[0]:
        for row, item in zip(batch[key], items, strict=True):
            assert torch.equal(row[tuple(map(slice, item[key].shape))], item[key])
            assert row.count_nonzero() == item[key].count_nonzero()


@each_backbone
def test_null_conditioning_is_what_inference_gives_without_a_negative_prompt(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    batch = adapter.collate([adapter.null_conditioning()] * 2)
    level = adapter.noise_schedule.level_at(torch.tensor([0.5, 0.5]))
    with spied_forward(case.denoisers(adapter)) as training, torch.no_grad():
        adapter.forward(adapter.denoiser, latents_for(adapter, case), level, batch)
    expected = _inference_of_empty_prompts(pipeline, adapter, case)
    ignored = {case.latents_argument, "timestep", "t", "return_dict"}
    _assert_same_arguments(training[0], case.visible(expected), ignore=ignored)


def _inference_of_empty_prompts(pipeline, adapter: BackboneAdapter, case: BackboneCase) -> dict:
    if case.unconditional is not None:
        return case.unconditional(pipeline)
    with spied_forward(case.denoisers(adapter)) as calls:
        pipeline(prompt=["", ""], num_inference_steps=1, **case.call_options)
    return calls[0]


# The denoiser


@each_case
def test_training_gives_the_denoiser_what_inference_gives_it(case):
    for training, inference in _calls_of_training_and_inference(case, case.build(), case.level_of_call):
        _assert_same_arguments(training, inference, floored=case.floors_timesteps)


@each_backbone
def test_training_gives_a_bfloat16_denoiser_what_inference_gives_it(case):
    """Rounded where the pipeline rounds, if the case does not say that the adapter knows better."""
    # Not `case.level_of_call`, which may read a rounded timestep.
    is_flow = case.level_of_call is not integer_level_of_call
    level_of_call = sampler_level_of_call if is_flow else integer_level_of_call
    calls = _calls_of_training_and_inference(case, case.build().to(torch.bfloat16), level_of_call)
    for training, inference in calls:
        ignored = {*case.not_as_in_bfloat16}
        _assert_same_arguments(training, inference, ignore=ignored, floored=case.floors_timesteps)
    for name in case.not_as_in_bfloat16:
        dtypes = [(_flat(training)[name].dtype, _flat(inference)[name].dtype) for training, inference in calls]
        assert (torch.float32, torch.bfloat16) in dtypes


def _calls_of_training_and_inference(
    case: BackboneCase, pipeline, level_of_call: Callable[[BackboneAdapter, dict], NoiseLevel]
) -> list[tuple[dict, dict]]:
    """The denoiser's arguments in each step of the sampler, and in training from the same latents and level."""
    adapter = adapter_for(pipeline)
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    levels: list[NoiseLevel] = []

    def some_of_the_latents(call: dict):
        levels.append(level_of_call(adapter, call))  # while the sampler is there
        return _as_denoiser_output(adapter, case, case.canonical(adapter, call[case.latents_argument]) / 2)

    with spied_forward(case.denoisers(adapter), some_of_the_latents) as inference:
        case.generate(pipeline, steps=3, output_type="latent")
    assert len(inference) >= 3
    with spied_forward(case.denoisers(adapter)) as training, torch.no_grad():
        for call, level in zip(inference, levels, strict=True):
            latents = case.canonical(adapter, call[case.latents_argument])
            adapter.forward(adapter.denoiser, latents, level, conditioning)
    return list(zip(training, map(case.visible, inference), strict=True))


def _as_denoiser_output(adapter: BackboneAdapter, case: BackboneCase, prediction: Tensor):
    return (case.denoiser_output or case.native)(adapter, prediction)


def _assert_same_arguments(
    actual: dict, expected: dict, ignore: set[str] = frozenset(), floored: bool = False
) -> None:
    actual, expected = _flat(actual), _flat(expected)
    assert actual.keys() - ignore == expected.keys() - ignore
    for name in actual.keys() - ignore:
        if name in ("timestep", "t"):
            _assert_same_times(actual[name], expected[name], floored)
        else:
            _assert_same(actual[name], expected[name], name)


def _flat(arguments: dict, prefix: str = "") -> dict:
    """Arguments and, of those that are dicts, the items as `argument.item`."""
    flat: dict = {}
    for name, value in arguments.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _assert_same_times(actual: Tensor, expected: Tensor, floored: bool) -> None:
    # Integers are as good as float32: the embedding makes the same of both. Half precision is not.
    one, other = (time if time.is_floating_point() else time.float() for time in (actual, expected))
    assert one.dtype == other.dtype
    whole = one.floor() if floored else one
    if floored:  # sigma * 1000 may have been rounded to the other side of an integer
        above = one.nextafter(torch.full_like(one, torch.inf)).floor()
        whole = torch.where(above == other, above, whole)
    assert torch.equal(whole, other.expand_as(one))  # inference may give one for the batch


def _assert_same(actual, expected, name: str) -> None:
    if isinstance(actual, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=name)
    elif isinstance(actual, list | tuple):
        assert len(actual) == len(expected), name
        for one, other in zip(actual, expected, strict=True):
            _assert_same(one, other, name)
    else:
        assert actual == expected, name


@each_case
def test_perfect_prediction_stays_on_the_path_of_the_pipelines_own_sampler(case):
    """If the target is right, a denoiser that knows x_0 and eps keeps inference on x_t = alpha_t x_0 + sigma_t eps."""
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    clean, noise = latents_for(adapter, case, seed=1), latents_for(adapter, case, seed=2)
    errors = []

    def oracle(call: dict):
        level = case.level_of_call(adapter, call)
        expected = level.add_noise(clean, noise)
        errors.append((case.canonical(adapter, call[case.latents_argument]) - expected).abs().max().item())
        return _as_denoiser_output(adapter, case, prediction_target(clean, noise, level, adapter.prediction_type))

    steps = 5
    start = case.native(adapter, first_latents(adapter, clean, noise, steps))
    with spied_forward(case.denoisers(adapter), oracle):
        case.generate(pipeline, steps=steps, latents=start, output_type="latent")
    assert len(errors) >= steps
    assert max(errors) < 2e-5


@pytest.mark.parametrize("case", FLOW_CASES, ids=lambda case: case.name)
def test_the_neighbour_of_a_level_is_the_samplers_next_sigma(case):
    """The grid of the importance weights is that of inference, with its shift."""
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    steps = 20

    def nothing(call: dict):
        latents = case.canonical(adapter, call[case.latents_argument])
        return _as_denoiser_output(adapter, case, torch.zeros_like(latents))

    with spied_forward(case.denoisers(adapter), nothing):
        case.generate(pipeline, steps=steps, output_type="latent")
    sigmas = pipeline.scheduler.sigmas.float()
    assert len(sigmas) == steps + 1
    schedule = adapter.noise_schedule_for(**case.size, num_steps=steps)
    previous = schedule.previous_level(schedule.level(sigmas[:-1]), steps).sigma_t
    torch.testing.assert_close(previous, sigmas[1:], rtol=0, atol=case.grid_atol)


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
    denoiser = _with_lora_in_the_input_layer_too(adapter)
    assert adapter.input_dtype(denoiser) == adapter.input_dtype(adapter.denoiser) == torch.bfloat16

    with spied_forward(case.denoisers(adapter)) as calls:
        loss, gradients = loss_and_gradients(adapter, denoiser, case)
    latents = calls[0][case.latents_argument]
    assert (latents[0] if isinstance(latents, list) else latents).dtype == torch.bfloat16
    assert loss.isfinite()
    assert len(gradients) == sum(p.requires_grad for p in denoiser.parameters()) > 0
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and "lora_" in name
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0


def _with_lora_in_the_input_layer_too(adapter: BackboneAdapter) -> nn.Module:
    targets, first = adapter.lora_target_modules, adapter.input_layer_name
    targets = f"{targets}|{first}" if isinstance(targets, str) else [*targets, first]
    return trained_lora(adapter, target_modules=targets)


@each_backbone
def test_the_input_dtype_of_quantised_weights_is_that_of_the_rest(case):
    """Integers come first, then the input layer's LoRA in float32: neither is what the rest is made of."""
    adapter = adapter_for(case.build())
    adapter.denoiser.to(torch.bfloat16)
    denoiser = _with_lora_in_the_input_layer_too(adapter)
    layers = {name: module for name, module in denoiser.named_modules() if "lora_" not in name}
    for layer in layers.values():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    adapter.denoiser.get_submodule(adapter.input_layer_name).base_layer.bias = None  # as FLUX.2 has none
    assert adapter.input_dtype(denoiser) == torch.bfloat16

    for name, parameter in list(denoiser.named_parameters()):
        if "lora_" not in name:
            owner, _, attribute = name.rpartition(".")
            integers = nn.Parameter(parameter.to(torch.int8), requires_grad=False)
            setattr(denoiser.get_submodule(owner), attribute, integers)
    assert adapter.input_dtype(denoiser) == torch.float32, "of the LoRA, since nothing else is left"


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
    runs = _count_calls(adapter.denoiser)
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(adapter, denoiser, case)
    assert max(runs.values()) == 2, "blocks must run again in the backward pass"
    torch.testing.assert_close(loss, checkpointed_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == checkpointed_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, rtol=1e-5, atol=1e-6)


def _count_calls(model: nn.Module) -> dict[str, int]:
    """How often each block (a child of a list of modules) runs."""
    runs: dict[str, int] = {}
    for name, blocks in model.named_modules():
        for index, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else []):
            key = f"{name}.{index}"
            runs[key] = 0
            block.register_forward_pre_hook(lambda *_, key=key: runs.update({key: runs[key] + 1}))
    return runs


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
def test_a_saved_lora_is_the_trained_model_in_plain_diffusers(case, tmp_path):
    """Alpha is not the rank: a file without it would load as another model."""
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    base = case.generate(pipeline, output_type="pt")
    denoiser = trained_lora(adapter, lora_alpha=8)
    tuned = case.generate(pipeline, output_type="pt")
    adapter.check_lora(denoiser)
    adapter.save_lora(denoiser, tmp_path)
    fresh = case.build()
    case.load_lora(fresh, tmp_path)
    loaded = case.generate(fresh, output_type="pt")
    torch.testing.assert_close(loaded, tuned, rtol=0, atol=1e-6)
    assert (tuned - base).abs().max() > 1e-4

    resumed = trained_lora(adapter_for(case.build()), lora_alpha=8, init_lora_weights="gaussian")
    adapter.load_lora(resumed, tmp_path)
    saved = {name: parameter for name, parameter in denoiser.named_parameters() if "lora_" in name}
    assert saved
    for name, parameter in resumed.named_parameters():
        assert "lora_" not in name or torch.equal(parameter, saved[name]), name


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
    assert adapter.denoiser is adapter.denoiser
    for module in case.denoisers(adapter):
        assert any(module is part for part in pipeline.components.values())
        assert any(module is part for part in adapter.denoiser.modules())
    adapted = {name for name, module in trained_lora(adapter).named_modules() if isinstance(module, LoraLayer)}
    assert adapted
    targets = adapter.lora_target_modules
    for target in [] if isinstance(targets, str) else targets:
        assert any(name.endswith(f".{target}") for name in adapted), target


def test_every_adapter_of_the_table_has_a_case():
    pipelines = {type(pipeline).__name__: pipeline for pipeline in (case.build() for case in BACKBONES)}
    assert pipelines.keys() == ADAPTERS.keys()
    for class_name, pipeline in pipelines.items():
        assert adapter_for(pipeline).pipeline_class_name == class_name


@each_backbone
def test_a_missing_component_is_named(case):
    facts = adapter_for(case.build())
    names = {facts.denoiser_name, *facts.frozen_names, *facts.tokenizer_names, "scheduler"} - {*facts.optional_names}
    for name in sorted(names):
        pipeline = case.build()
        setattr(pipeline, name, None)
        with pytest.raises(BackboneError, match=f"has no {name}"):
            adapter_for(pipeline)
