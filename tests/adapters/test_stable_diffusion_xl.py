# SPDX-License-Identifier: Apache-2.0
"""What is particular to Stable Diffusion XL: sizes, empty prompts, a VAE that overflows, Turbo and the refiner."""

import copy

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from tests.adapters.backbone_cases import PROMPTS, spied_forward
from tests.adapters.cases.stable_diffusion_xl import unconditional
from tests.tiny.stable_diffusion_xl import POOLED_DIM, tiny_stable_diffusion_xl
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import BackboneError


def pixels(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_unet_is_told_the_size_that_it_draws():
    """Also one of odd latents, 5 x 9, which no layer crops; the batch has a size of its own."""
    pipeline = tiny_stable_diffusion_xl()
    with spied_forward(pipeline.unet) as inference:
        pipeline(PROMPTS, height=24, width=40, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert torch.equal(time_ids(pipeline, 24, 40), inference[0]["added_cond_kwargs"]["time_ids"])
    assert time_ids(pipeline, 20, 36).tolist() == [[20, 36, 0, 0, 20, 36]] * 2


def test_sizes_are_exact_whatever_the_dtype_of_the_model():
    """Bfloat16 would round 2056 to 2048, as inference does in a bfloat16 pipeline."""
    pipeline = tiny_stable_diffusion_xl()
    pipeline.unet.to(torch.bfloat16)
    assert time_ids(pipeline, 2056, 8).tolist() == [[2056, 8, 0, 0, 2056, 8]] * 2


def time_ids(pipeline, height: int, width: int) -> torch.Tensor:
    """What the adapter gives the UNet for latents of this size, whose shape the prediction has."""
    adapter = adapter_for(pipeline)
    latents = torch.zeros(2, *adapter.latent_shape(height, width))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    with spied_forward(pipeline.unet) as calls, torch.no_grad():
        level = adapter.noise_schedule.level(torch.tensor([7, 7]))
        assert adapter.forward(pipeline.unet, latents, level, conditioning).shape == latents.shape
    return calls[0]["added_cond_kwargs"]["time_ids"]


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_prompt_is_zeros_where_inference_forces_them(zeros):
    pipeline = tiny_stable_diffusion_xl(force_zeros_for_empty_prompt=zeros)
    adapter, expected = adapter_for(pipeline), unconditional(pipeline)
    null, empty = adapter.null_conditioning(), adapter.encode_prompts([""])[0]
    assert torch.equal(null["prompt_embeds"], expected["encoder_hidden_states"][0])
    assert torch.equal(null["pooled_prompt_embeds"], expected["added_cond_kwargs"]["text_embeds"][0])
    for key in empty:
        assert empty[key].any() and null[key].any() != zeros
        assert torch.equal(null[key], empty[key]) != zeros


def test_prompts_of_any_length_have_the_length_of_inference():
    adapter = adapter_for(tiny_stable_diffusion_xl())
    assert adapter.encode_prompts([]) == []
    for item in adapter.encode_prompts(["", "a much longer prompt than the tokenizers take"]):
        assert {key: tuple(value.shape) for key, value in item.items()} == {
            "prompt_embeds": (16, 8 + 16),
            "pooled_prompt_embeds": (POOLED_DIM,),
        }


# The VAE


def overflowing_vae(**vae_options):
    """A pipeline with a float16 VAE, the activations of which pass 65504 in the first layer."""
    pipeline = tiny_stable_diffusion_xl(vae_options=vae_options)
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.mul_(1e5)
        pipeline.vae.decoder.conv_in.weight.mul_(1e5)
    pipeline.vae.to(torch.float16)
    assert pipeline.vae.encoder.conv_in.weight.isfinite().all()
    return pipeline


def test_a_float16_vae_that_overflows_runs_in_float32():
    pipeline = overflowing_vae()
    wide = copy.deepcopy(pipeline.vae).to(torch.float32)
    before = copy.deepcopy(pipeline.vae.state_dict())
    with torch.no_grad():
        assert not pipeline.vae.encode(pixels(32, 32).half()).latent_dist.mean.isfinite().all()
        expected = wide.encode(pixels(32, 32)).latent_dist.mean * 0.13025
        drawn = wide.decode(expected / 0.13025, return_dict=False)[0].clamp(-1, 1)

    adapter = adapter_for(pipeline)
    latents = adapter.encode_media(pixels(32, 32))
    assert latents.isfinite().all() and torch.equal(latents, expected)
    torch.testing.assert_close(adapter.decode(latents), drawn, rtol=0, atol=1e-5)
    after = pipeline.vae.state_dict()
    assert pipeline.vae.dtype == torch.float16 and all(torch.equal(after[name], before[name]) for name in before)


def test_a_float16_vae_is_put_back_after_an_error():
    adapter = adapter_for(overflowing_vae())
    with pytest.raises(RuntimeError, match="channels"):
        adapter.encode_media(torch.zeros(1, 4, 32, 32))
    assert adapter.pipeline.vae.dtype == torch.float16


def test_a_float16_vae_that_does_not_overflow_stays_in_float16():
    pipeline = tiny_stable_diffusion_xl(vae_options={"force_upcast": False})
    pipeline.vae.to(torch.float16)
    with spied_forward(pipeline.vae.encoder) as calls:
        latents = adapter_for(pipeline).encode_media(pixels(32, 32))
    assert calls[0]["sample"].dtype == torch.float16 and latents.dtype == torch.float32


def test_latents_with_statistics_per_channel_are_decoded_as_by_the_pipeline():
    statistics = {"latents_mean": [-1.6, 1.1, -0.4, 0.9], "latents_std": [8.4, 5.9, 6.6, 5.2]}
    pipeline = tiny_stable_diffusion_xl(vae_options={**statistics, "scaling_factor": 0.5})
    adapter = adapter_for(pipeline)
    latents = adapter.encode_media(pixels(32, 32))
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels(32, 32)).latent_dist.mean
    torch.testing.assert_close(adapter.denormalize_latents(latents), mean, rtol=1e-5, atol=1e-6)
    drawn = pipeline(
        PROMPTS,
        num_inference_steps=1,
        output_type="pt",
        callback_on_step_end=lambda *_: {"latents": latents},
    ).images
    torch.testing.assert_close(adapter.decode(latents), drawn * 2 - 1, rtol=0, atol=1e-5)


# Variants


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo_trains_at_the_levels_that_it_samples(steps):
    """Ancestral sampling adds noise of its own at each step; perfect predictions of it all lead to x_0."""
    pipeline = tiny_stable_diffusion_xl(scheduler="EulerAncestralDiscrete", timestep_spacing="trailing")
    adapter = adapter_for(pipeline)
    assert adapter.prediction_type == "epsilon"
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    clean = torch.randn(2, *adapter.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    levels, noises = [], []

    def oracle(call: dict) -> torch.Tensor:
        levels.append(adapter.noise_schedule.level(call["timestep"].expand(2).long()))
        alpha_t, sigma_t = levels[-1].coefficients_for(clean)
        noises.append((call["sample"] - alpha_t * clean) / sigma_t)
        return noises[-1]

    with spied_forward(pipeline.unet, oracle) as inference:
        drawn = pipeline(
            PROMPTS,
            num_inference_steps=steps,
            guidance_scale=0.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
    assert [int(level.timestep[0]) for level in levels] == list(range(999, 0, -1000 // steps))
    torch.testing.assert_close(drawn, clean, rtol=0, atol=1e-4)
    assert all(0.8 < noise.std() < 1.2 for noise in noises), "the latents are at the level that the UNet is told"
    for call, level in zip(inference, levels, strict=True):
        with spied_forward(pipeline.unet) as training, torch.no_grad():
            adapter.forward(pipeline.unet, call["sample"], level, conditioning)
        assert torch.equal(training[0]["sample"], call["sample"])
        assert torch.equal(training[0]["encoder_hidden_states"], call["encoder_hidden_states"])
        for name, value in call["added_cond_kwargs"].items():
            assert torch.equal(training[0]["added_cond_kwargs"][name], value)


REFUSED = {
    "score": ({"projection_class_embeddings_input_dim": 5 * 4 + POOLED_DIM}, "input_dim=32, .* aesthetic score"),
    "distilled": ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8.*guidance scale"),
    "inpainting": ({"in_channels": 9}, "takes 9 channels"),
    "of_sd15": ({"addition_embed_type": None}, "addition_embed_type=None, not 'text_time'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unets_of_other_inputs_are_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(BackboneError, match=message):
        adapter_for(tiny_stable_diffusion_xl(unet_options=options))


def test_the_refiner_is_refused_by_name():
    pipeline = tiny_stable_diffusion_xl()
    pipeline.register_to_config(requires_aesthetics_score=True)
    with pytest.raises(BackboneError, match="requires_aesthetics_score=True.*refiner"):
        adapter_for(pipeline)
    pipeline.text_encoder = pipeline.tokenizer = None
    with pytest.raises(BackboneError, match="no text_encoder, only text_encoder_2: SDXL's refiner"):
        adapter_for(pipeline)


def test_the_process_of_playground_is_refused():
    pipeline = tiny_stable_diffusion_xl()
    pipeline.scheduler = EDMDPMSolverMultistepScheduler()
    with pytest.raises(BackboneError, match="EDMDPMSolverMultistepScheduler has no beta schedule"):
        adapter_for(pipeline)
