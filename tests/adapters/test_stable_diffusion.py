# SPDX-License-Identifier: Apache-2.0
"""What is particular to Stable Diffusion: its noise process from the scheduler's configuration, and its variants."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from tests.tiny_models import TOKENS, tiny_scheduler, tiny_stable_diffusion
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import BackboneError


def published_alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion 1.5: betas linear in their square root, from 0.00085 to 0.012."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, dim=0)


SAMPLERS = ("DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep")


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_every_sampler_gives_the_published_schedule(scheduler):
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = tiny_scheduler(scheduler)
    schedule = adapter_for(pipeline).noise_schedule
    assert schedule.num_train_timesteps == 1000 and schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas_cumprod, published_alphas_cumprod(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), pipeline.scheduler.alphas_cumprod, rtol=1e-5, atol=0)
    assert torch.equal(schedule.alphas_cumprod, adapter_for(tiny_stable_diffusion()).noise_schedule.alphas_cumprod)


def test_the_state_of_the_scheduler_is_not_read():
    pipeline = tiny_stable_diffusion(scheduler="EulerDiscrete")
    pipeline("a cat", num_inference_steps=3, output_type="latent")
    pipeline.scheduler.alphas_cumprod.zero_()
    schedule = adapter_for(pipeline).noise_schedule
    torch.testing.assert_close(schedule.alphas_cumprod, published_alphas_cumprod(), rtol=1e-6, atol=0)


def test_zero_terminal_snr_is_honoured():
    plain = adapter_for(tiny_stable_diffusion("v_prediction")).noise_schedule.alphas_cumprod
    pipeline = tiny_stable_diffusion("v_prediction", rescale_betas_zero_snr=True)
    rescaled = adapter_for(pipeline).noise_schedule.alphas_cumprod
    assert rescaled[-1] == 0 and rescaled[-2] > 0
    # Lin et al. (2024), algorithm 1: an affine map of sqrt(alphas_cumprod) that keeps the first and zeroes the last.
    root = plain.sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(rescaled.sqrt(), expected, rtol=1e-4, atol=1e-6)
    euler = tiny_stable_diffusion("v_prediction", "EulerDiscrete", rescale_betas_zero_snr=True)
    assert torch.equal(adapter_for(euler).noise_schedule.alphas_cumprod, rescaled)


def test_betas_that_a_sampler_has_by_default_are_honoured():
    """LCMScheduler() has Stable Diffusion's betas by default, DDPMScheduler() others."""
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = LCMScheduler()
    schedule = adapter_for(pipeline).noise_schedule
    torch.testing.assert_close(schedule.alphas_cumprod, published_alphas_cumprod(), rtol=1e-6, atol=0)


def test_trained_betas_are_taken_as_they_are():
    betas = torch.linspace(0.01, 0.2, 20).tolist()
    pipeline = tiny_stable_diffusion(num_train_timesteps=20, trained_betas=betas)
    expected = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)
    torch.testing.assert_close(adapter_for(pipeline).noise_schedule.alphas_cumprod, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction_type", ["sample", "nonsense"])
def test_unknown_prediction_types_are_named(prediction_type):
    pipeline = tiny_stable_diffusion(prediction_type)
    with pytest.raises(BackboneError, match=f"'{prediction_type}'.*'epsilon' or 'v_prediction'"):
        adapter_for(pipeline)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        EDMEulerScheduler(),
        tiny_scheduler("UniPCMultistep", use_flow_sigmas=True, prediction_type="epsilon"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_another_process_are_refused(scheduler):
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = scheduler
    with pytest.raises(BackboneError, match=type(scheduler).__name__):
        adapter_for(pipeline)


def test_betas_that_cannot_be_computed_are_refused():
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = DDPMScheduler()
    pipeline.scheduler.register_to_config(beta_schedule="unheard_of")
    with pytest.raises(BackboneError, match="betas of the DDPMScheduler.*unheard_of"):
        adapter_for(pipeline)


UNSUPPORTED_UNETS = {
    "inpainting": ({"in_channels": 9}, "takes 9 channels but the VAE's latents have 4"),
    "learned_variance": ({"out_channels": 8}, "gives 8 channels"),
    "class_labels": ({"num_class_embeds": 3}, "num_class_embeds=3.*class conditioning"),
    "class_embedding": ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
    "distilled": ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8.*guidance scale"),
    "image_conditioned": (
        {"addition_embed_type": "image", "encoder_hid_dim": 8, "cross_attention_dim": 16},
        "addition_embed_type='image'",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED_UNETS)
def test_unets_that_need_more_inputs_are_refused(name):
    options, message = UNSUPPORTED_UNETS[name]
    pipeline = tiny_stable_diffusion()
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, **options)
    with pytest.raises(BackboneError, match=message):
        adapter_for(pipeline)


def test_long_and_empty_prompts_have_the_length_of_inference():
    adapter = adapter_for(tiny_stable_diffusion())
    assert adapter.encode_prompts([]) == []
    for item in adapter.encode_prompts(["", "a", "a much longer prompt than the tokenizer takes"]):
        assert list(item) == ["prompt_embeds"] and item["prompt_embeds"].shape == (TOKENS, 16)


def test_latents_of_unequal_and_odd_sizes():
    """Odd latent sizes are cropped by no layer: the prediction has the size of its input."""
    adapter = adapter_for(tiny_stable_diffusion())
    shape = adapter.latent_shape(20, 36)
    assert shape == (4, 5, 9)
    level = adapter.noise_schedule.level(torch.tensor([7]))
    conditioning = adapter.collate(adapter.encode_prompts(["a"]))
    with torch.no_grad():
        assert adapter.forward(adapter.denoiser, torch.zeros(1, *shape), level, conditioning).shape == (1, *shape)
    assert adapter.encode_media(torch.zeros(1, 3, 20, 36)).shape == (1, *shape)


# Sampling


def strict_stable_diffusion() -> StableDiffusionPipeline:
    """With a safety checker that flags everything."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "image_size": 8, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.data.fill_(-2)  # below any cosine
    size = {"shortest_edge": 8}
    processor = CLIPImageProcessor(size=size, crop_size={"height": 8, "width": 8})
    parts = {**tiny_stable_diffusion().components, "safety_checker": checker, "feature_extractor": processor}
    pipeline = StableDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_samples_are_drawn_without_the_safety_checker(tmp_path):
    """Its black images would pass for those of a model that was trained badly."""
    pipeline = strict_stable_diffusion()
    checker = pipeline.safety_checker
    adapter = adapter_for(pipeline)
    options = {"num_inference_steps": 2, "generator": torch.Generator()}
    options["generator"].manual_seed(0)
    assert not pipeline("a cat", output_type="pt", **options).images.any(), "the checker must flag everything"
    calls = []
    checker.register_forward_pre_hook(lambda *_: calls.append(1))
    options["generator"].manual_seed(0)
    drawn = adapter.sample("a cat", 32, 32, **options)
    options["generator"].manual_seed(0)
    assert torch.equal(drawn, adapter_for(tiny_stable_diffusion()).sample("a cat", 32, 32, **options))

    with pytest.raises(ValueError, match="divisible by 8"):
        adapter.sample("a cat", 33, 32)
    assert not calls and pipeline.safety_checker is checker
    adapter.save_pipeline(tmp_path)
    assert (tmp_path / "safety_checker" / "config.json").is_file()
