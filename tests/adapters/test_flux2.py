# SPDX-License-Identifier: Apache-2.0
"""What is particular to FLUX.2: latents in patches under batch-norm statistics, guidance, and its own shift."""

import inspect
import math
import re

import pytest
import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from torch import Tensor, nn

from tests.adapters.backbone_cases import PROMPTS, sampler_level_of_call, spied_forward
from tests.adapters.cases.flux2 import CASES, SIZE, packed, unpacked
from tests.tiny.flux2 import tiny_flux2, tiny_flux2_klein
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import BackboneError

each_kind = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoiser_arguments(adapter, extra: dict | None = None) -> dict:
    """What `forward` gives the transformer for latents of two prompts."""
    latents = randn(2, *adapter.latent_shape(**SIZE))
    level = adapter.noise_schedule.level_at(torch.tensor([0.3, 0.8]))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    with spied_forward(adapter.denoiser, lambda call: call["hidden_states"]) as calls:
        assert torch.equal(adapter.forward(adapter.denoiser, latents, level, conditioning, extra), latents)
    assert torch.equal(calls[0]["hidden_states"], packed(adapter, latents))
    return calls[0]


@each_kind
def test_latents_are_those_of_the_pipelines_own_image_conditioning(case):
    """The pipeline encodes and normalises images that it is given to edit."""
    pipeline = case.build()
    pixels = torch.rand(2, *case.media_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = pipeline._encode_vae_image(pixels, generator=None)
    torch.testing.assert_close(adapter_for(pipeline).encode_media(pixels), expected, rtol=0, atol=1e-6)


@each_kind
def test_noise_in_patches_samples_the_vaes_posterior(case):
    pipeline = case.build()
    adapter = adapter_for(pipeline)
    pixels = torch.rand(2, *case.media_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = randn(2, *adapter.latent_shape(**SIZE))
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        sample = posterior.mean + posterior.std * pipeline._unpatchify_latents(noise)
    expected = adapter.normalize_latents(pipeline._patchify_latents(sample))
    torch.testing.assert_close(adapter.encode_media(pixels, noise=noise), expected, rtol=0, atol=1e-6)


@each_kind
def test_the_shift_depends_on_the_size_and_on_the_samplers_steps(case):
    """For 64 x 64 tokens, mu is 2.2562 at 10 steps and 1.1500 at 200, and linear in between: 2.0233 at 50."""
    adapter = adapter_for(case.build())
    side = 64 * adapter.spatial_multiple
    for num_steps, mu in ((10, 2.256246), (50, 2.023351), (200, 1.149997)):
        shift = adapter.noise_schedule_for(side, side, num_steps=num_steps).shift
        assert math.log(shift) == pytest.approx(mu, abs=1e-5)
    assert adapter.noise_schedule_for(side // 2, side).shift < adapter.noise_schedule_for(side, side).shift


def test_dev_embeds_the_guidance_scale_and_klein_takes_none():
    dev, klein = adapter_for(tiny_flux2()), adapter_for(tiny_flux2_klein())
    default = inspect.signature(Flux2Pipeline.__call__).parameters["guidance_scale"].default
    assert torch.equal(denoiser_arguments(dev)["guidance"], torch.full((2,), default))
    assert torch.equal(denoiser_arguments(dev, {"guidance_scale": 1.0})["guidance"], torch.ones(2))
    assert "guidance" not in denoiser_arguments(klein, {"guidance_scale": 1.0})


def test_a_distilled_klein_is_called_once_a_step_and_as_in_training():
    pipeline = tiny_flux2_klein(is_distilled=True)
    expected = denoiser_arguments(adapter_for(pipeline))
    with spied_forward(pipeline.transformer) as calls:
        pipeline(prompt=PROMPTS, num_inference_steps=2, guidance_scale=4.0, output_type="latent", **SIZE)
    assert len(calls) == 2
    assert calls[0].keys() == expected.keys()
    for name in ("encoder_hidden_states", "txt_ids", "img_ids"):
        assert torch.equal(calls[0][name], expected[name]), name


@each_kind
def test_a_bfloat16_pipeline_is_called_as_in_inference(case):
    """Inference rounds sigma * 1000, not sigma, which is another timestep."""
    pipeline = case.build()
    pipeline.to(torch.bfloat16)
    adapter = adapter_for(pipeline)
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    levels = []

    def predict_some_of_the_latents(call: dict) -> Tensor:
        levels.append(sampler_level_of_call(adapter, call))
        return call["hidden_states"] / 2

    with spied_forward(adapter.denoiser, predict_some_of_the_latents) as inference:
        case.generate(pipeline, steps=9, output_type="latent")
    for call, level in zip(inference, levels, strict=True):
        with spied_forward(adapter.denoiser, lambda call: call["hidden_states"]) as training:
            adapter.forward(adapter.denoiser, unpacked(adapter, call["hidden_states"]), level, conditioning)
        assert training[0].keys() == call.keys()
        for name, value in call.items():
            assert not isinstance(value, Tensor) or torch.equal(training[0][name], value), name
            assert not isinstance(value, Tensor) or training[0][name].dtype == value.dtype, name


@pytest.mark.parametrize(
    ("option", "message"),
    [({"in_channels": 16}, "takes 16 channels but 2x2 patches.*have 8"), ({"out_channels": 4}, "gives 4 channels")],
    ids=["input", "output"],
)
def test_transformers_of_other_channels_are_refused(option, message):
    pipeline = tiny_flux2()
    pipeline.transformer = Flux2Transformer2DModel.from_config(pipeline.transformer.config, **option)
    with pytest.raises(BackboneError, match=message):
        adapter_for(pipeline)


def test_both_kinds_of_blocks_get_lora():
    """The name `to_out` is a layer in one kind of block and a list of layers in the other."""
    adapter = adapter_for(tiny_flux2())
    matched = {n: m for n, m in adapter.denoiser.named_modules() if re.fullmatch(adapter.lora_target_modules, n)}
    assert sorted(name.removeprefix("single_").split(".", 2)[2] for name in matched) == sorted(
        ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj", "attn.to_out"]
    )
    assert all(isinstance(module, nn.Linear) for module in matched.values())
