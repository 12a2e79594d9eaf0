# SPDX-License-Identifier: Apache-2.0
"""What is particular to FLUX.1: guidance as an input, a shift that grows with the image, and rounded timesteps."""

import inspect
import math

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS, sampler_level_of_call, spied_forward
from tests.adapters.cases.flux import CASES, packed, unpacked
from tests.tiny.flux import tiny_flux
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import BackboneError

DEV = CASES[0]


def denoiser_arguments(adapter, extra: dict | None = None) -> dict:
    """What `forward` gives the transformer for latents of two prompts."""
    latents = torch.randn(2, *adapter.latent_shape(**DEV.size), generator=torch.Generator().manual_seed(0))
    level = adapter.noise_schedule.level_at(torch.tensor([0.3, 0.8]))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    with spied_forward(adapter.denoiser) as calls, torch.no_grad():
        adapter.forward(adapter.denoiser, latents, level, conditioning, extra)
    return calls[0]


def test_the_shift_grows_with_the_image_for_dev_only():
    """256 tokens (256 x 256 pixels at full size) have mu = 0.5, 4096 tokens (1024 x 1024) have 1.15."""
    dev, schnell = adapter_for(tiny_flux()), adapter_for(tiny_flux(guidance_embeds=False))
    for tokens, mu in ((16, 0.5), (64, 1.15)):
        side = tokens * dev.spatial_multiple
        assert dev.noise_schedule_for(side, side).shift == pytest.approx(math.exp(mu))
        assert schnell.noise_schedule_for(side, side).shift == 1.0
    assert dev.noise_schedule.shift == dev.noise_schedule_for(*dev.default_size).shift


def test_dev_embeds_the_guidance_scale_and_schnell_takes_none():
    dev, schnell = adapter_for(tiny_flux()), adapter_for(tiny_flux(guidance_embeds=False))
    default = inspect.signature(FluxPipeline.__call__).parameters["guidance_scale"].default
    assert torch.equal(denoiser_arguments(dev)["guidance"], torch.full((2,), default))
    assert torch.equal(denoiser_arguments(dev, {"guidance_scale": 1.0})["guidance"], torch.ones(2))
    assert "guidance" not in denoiser_arguments(schnell, {"guidance_scale": 1.0})


def test_a_bfloat16_pipeline_is_called_as_in_inference():
    """Inference rounds sigma * 1000, not sigma, which is another timestep."""
    pipeline = tiny_flux()
    pipeline.to(torch.bfloat16)
    adapter = adapter_for(pipeline)
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    levels = []

    def predict_some_of_the_latents(call: dict) -> Tensor:
        levels.append(sampler_level_of_call(adapter, call))
        return call["hidden_states"] / 2

    with spied_forward(adapter.denoiser, predict_some_of_the_latents) as inference:
        DEV.generate(pipeline, steps=9, output_type="latent")
    for call, level in zip(inference, levels, strict=True):
        with spied_forward(adapter.denoiser, lambda call: call["hidden_states"]) as training:
            adapter.forward(adapter.denoiser, unpacked(adapter, call["hidden_states"]), level, conditioning)
        assert training[0].keys() == call.keys()
        for name, value in call.items():
            assert not isinstance(value, Tensor) or torch.equal(training[0][name], value), name
            assert not isinstance(value, Tensor) or training[0][name].dtype == value.dtype, name


def test_dropout_of_text_encoders_left_in_train_mode_does_not_act():
    pipeline = tiny_flux()
    adapter = adapter_for(pipeline)
    expected = adapter.encode_prompts(PROMPTS)[0]
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.train()
    for name, value in adapter.encode_prompts(PROMPTS)[0].items():
        assert torch.equal(value, expected[name]), name


def test_forward_unpacks_what_it_packs():
    """A transformer that gives back its tokens gives back the latents, whose height is not their width."""
    adapter = adapter_for(tiny_flux())
    latents = torch.randn(2, *adapter.latent_shape(**DEV.size), generator=torch.Generator().manual_seed(0))
    level = adapter.noise_schedule.level_at(torch.tensor([0.3, 0.8]))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    with spied_forward(adapter.denoiser, lambda call: call["hidden_states"]) as calls:
        prediction = adapter.forward(adapter.denoiser, latents, level, conditioning)
    assert torch.equal(prediction, latents)
    assert torch.equal(calls[0]["hidden_states"], packed(adapter, latents))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"in_channels": 32}, "takes 32 channels but 2x2 patches.*have 16: an inpainting or control model"),
        ({"out_channels": 8}, "gives 8 channels"),
    ],
    ids=["control", "output"],
)
def test_transformers_that_need_more_inputs_are_refused(option, message):
    pipeline = tiny_flux()
    pipeline.transformer = FluxTransformer2DModel.from_config(pipeline.transformer.config, **option)
    with pytest.raises(BackboneError, match=message):
        adapter_for(pipeline)


def test_both_kinds_of_blocks_get_lora():
    adapter = adapter_for(tiny_flux())
    names = [name for name, _ in adapter.denoiser.named_modules() if name.endswith(adapter.lora_target_modules)]
    blocks = [name.split(".")[0] for name in names]
    assert blocks.count("transformer_blocks") == 12 and blocks.count("single_transformer_blocks") == 3
    assert len(blocks) == 15
