# SPDX-License-Identifier: Apache-2.0
"""What every adapter owes: media become latents that the pipeline decodes, at sizes that the model really takes."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.adapters.backbone_cases import (
    BACKBONES,
    PROMPTS,
    BackboneCase,
)
from tests.adapters.contract import each_backbone, latents_for, media, randn
from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.errors import ConfigurationError


@each_backbone
def test_the_pipelines_decode_undoes_encode_media(case):
    """Latents put into the pipeline's last step come out as the VAE's own reconstruction; 10 % off does not."""
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    pixels = media(case)
    with torch.no_grad():
        expected = ((case.reconstruct or _through_the_vae)(pipeline, pixels) / 2 + 0.5).clamp(0, 1)

    latents = adapter.encode_media(pixels)
    assert latents.shape[1:] == adapter.latent_shape(**case.size)
    decoded = _decoded_by_pipeline(adapter, case, latents)
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
    assert (_decoded_by_pipeline(adapter, case, latents * 1.1) - expected).abs().max() > 1e-3
    torch.testing.assert_close(adapter.decode(latents), expected * 2 - 1, rtol=0, atol=2e-5)


def _through_the_vae(pipeline, pixels: Tensor) -> Tensor:
    posterior = pipeline.vae.encode(pixels).latent_dist
    return pipeline.vae.decode(posterior.mean, return_dict=False)[0]


def _decoded_by_pipeline(adapter: BackboneAdapter, case: BackboneCase, latents: Tensor) -> Tensor:
    if case.decoded_by_pipeline is not None:
        return case.decoded_by_pipeline(adapter, latents)

    def inject(_pipeline, step: int, _timestep, tensors: dict) -> dict:
        return {"latents": case.native(adapter, latents)} if step == 1 else tensors

    return case.generate(adapter.pipeline, steps=2, output_type="pt", callback_on_step_end=inject)


@each_backbone
def test_encode_media_samples_the_posterior_with_the_given_noise(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    pixels = media(case, batch=1)
    mean = adapter.encode_media(pixels)
    assert mean.shape == (1, *adapter.latent_shape(**case.size)) and mean.dtype == torch.float32
    noise = randn(*mean.shape, seed=3)
    sampled = adapter.encode_media(pixels, noise=noise)
    assert torch.equal(adapter.encode_media(pixels, noise=torch.zeros_like(noise)), mean)
    unit = adapter.normalize_latents(torch.ones_like(mean)) - adapter.normalize_latents(torch.zeros_like(mean))
    with torch.no_grad():
        posterior = adapter._vae_encode(pipeline.vae, pixels)
    torch.testing.assert_close(sampled - mean, posterior.std * noise * unit, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.denormalize_latents(mean), posterior.mean, rtol=1e-5, atol=1e-5)


@each_backbone
def test_a_large_batch_is_encoded_and_decoded_in_slices(case, monkeypatch):
    adapter = adapter_for(case.build())
    batch = 2 * adapter.vae_slice_size + 1
    pixels = media(case, batch)
    encode, sizes = adapter.pipeline.vae.encode, []
    monkeypatch.setattr(adapter.pipeline.vae, "encode", lambda x, *args: [sizes.append(len(x)), encode(x, *args)][1])
    latents = adapter.encode_media(pixels)
    assert sizes == [adapter.vae_slice_size] * 2 + [1]
    decoded = adapter.decode(latents)
    assert latents.shape[0] == decoded.shape[0] == batch
    last = batch - 1
    torch.testing.assert_close(latents[last], adapter.encode_media(pixels[last:])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded[last], adapter.decode(latents[last:])[0], rtol=1e-4, atol=1e-5)


@each_backbone
def test_a_video_model_takes_images_for_single_frames(case):
    adapter = adapter_for(case.build())
    height, width = case.size["height"], case.size["width"]
    if not adapter.is_video:
        with pytest.raises(ConfigurationError, match="draws images"):
            adapter.latent_shape(height, width, 5)
        return
    try:
        shape = adapter.latent_shape(height, width, 1)
    except ConfigurationError as error:
        assert "num_frames 1 " in str(error)
        return
    images = media(case)[:, :, 0]
    latents = adapter.encode_media(images)
    assert latents.shape == (2, *shape)
    assert adapter.decode(latents).shape == (2, 3, 1, height, width)
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    with torch.no_grad():
        level = adapter.noise_schedule.level_at(torch.tensor([0.3, 0.8]))
        assert adapter.forward(adapter.denoiser, latents, level, conditioning).shape == latents.shape


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
    assert (latents - expected).abs().max() < 0.05 * expected.abs().max()


@each_backbone
def test_freeze_leaves_the_denoiser_alone(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    adapter.denoiser.train()
    for module in adapter.frozen_modules():
        module.train()
    adapter.freeze()
    for module in adapter.frozen_modules():
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())
    assert adapter.denoiser.training and all(p.requires_grad for p in adapter.denoiser.parameters())


@each_backbone
def test_sizes_are_checked_with_the_nearest_valid_ones(case):
    adapter = adapter_for(case.build())
    multiple, valid = adapter.spatial_multiple, case.size
    adapter.validate_size(**valid)
    side = valid["width"]
    with pytest.raises(ConfigurationError, match=rf"width {side + 1} .* {side} or {side + multiple}"):
        adapter.validate_size(**{**valid, "width": side + 1})
    with pytest.raises(ConfigurationError, match=rf"height 0 .*Nearest valid: {multiple}\."):
        adapter.latent_shape(0, multiple, valid["num_frames"])
    if adapter.is_video:
        frames = valid["num_frames"]
        with pytest.raises(ConfigurationError, match=rf"num_frames {frames + 1} .*{frames} or "):
            adapter.validate_size(**{**valid, "num_frames": frames + 1})


class _StopHere(Exception):
    pass


@each_backbone
def test_default_sizes_are_those_of_the_pipelines_call(case, monkeypatch):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    prepare = pipeline.prepare_latents
    seen = {}

    def stop(*args, **kwargs):
        seen.update(inspect.signature(prepare).bind(*args, **kwargs).arguments)
        raise _StopHere

    monkeypatch.setattr(pipeline, "prepare_latents", stop)
    options = {name: value for name, value in case.call_options.items() if name not in case.size}
    with pytest.raises(_StopHere):
        pipeline(prompt=PROMPTS[0], num_inference_steps=1, **options)
    assert adapter.default_size == (seen["height"], seen["width"])
    if adapter.is_video:
        frames = next(value for name, value in seen.items() if name in ("num_frames", "frames"))
        assert adapter.default_num_frames + case.added_frames == frames
    else:
        assert adapter.default_num_frames == 1


# Sampling


@each_backbone
def test_sample_draws_what_the_pipeline_draws(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    argument = adapter.guidance_argument
    takes_guidance = argument in inspect.signature(pipeline.__call__).parameters
    for guidance in (None, 3.0) if takes_guidance else (None,):
        scale = {argument: guidance or call_default(pipeline, argument)} if takes_guidance else {}
        options = {"prompt": PROMPTS[:1], "output_type": "pt", **scale, **adapter.sampling_options}
        expected = case.generate(pipeline, **options)[0].float() * 2 - 1
        drawn = _sample(adapter, case, guidance_scale=guidance)
        assert drawn.shape == case.media_shape and drawn.dtype == torch.float32
        assert -1 <= drawn.min() < drawn.max() <= 1
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-6)


def _sample(adapter: BackboneAdapter, case: BackboneCase, **options) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return adapter.sample(PROMPTS[0], **case.size, num_inference_steps=2, generator=generator, **options)


@each_backbone
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_float32_vae_decodes_the_samples_of_a_bfloat16_denoiser_in_float32(case, autocast):
    """As the trainer loads the base of a LoRA."""
    adapter = adapter_for(case.build())
    encoders = [module for module in adapter.frozen_modules() if module is not adapter.pipeline.vae]
    for module in [*encoders, *case.denoisers(adapter)]:
        module.to(torch.bfloat16)
    seen = []
    adapter.pipeline.vae.decoder.register_forward_pre_hook(
        lambda _module, inputs: seen.append((inputs[0].dtype, torch.is_autocast_enabled("cpu")))
    )
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        drawn = _sample(adapter, case)
    assert {*seen} == {(torch.float32, False)}
    assert drawn.shape == case.media_shape and drawn.dtype == torch.float32 and drawn.isfinite().all()
    assert -1 <= drawn.min() < drawn.max() <= 1
    assert "decode" not in vars(adapter.pipeline.vae)


@each_backbone
def test_what_a_prompt_gives_in_a_batch_is_what_it_gives_alone(case):
    """To rounding: prompts of other lengths are padded together, and each starts from its own noise."""
    adapter = adapter_for(case.build())

    def drawn(*numbers: int) -> Tensor:
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        prompts = [PROMPTS[number] for number in numbers]
        return adapter.sample_batch(prompts, **case.size, num_inference_steps=2, generators=generators)

    together = drawn(0, 1)
    assert together.shape == (2, *case.media_shape)
    for number in range(2):
        torch.testing.assert_close(together[number], drawn(number)[0], rtol=0, atol=1e-4)


def test_a_batch_needs_a_generator_for_each_of_its_prompts():
    adapter = adapter_for(BACKBONES[0].build())
    with pytest.raises(ConfigurationError, match="1 generators for 2 prompts"):
        adapter.sample_batch(PROMPTS, **BACKBONES[0].size, generators=[torch.Generator()])
