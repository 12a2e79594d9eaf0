# SPDX-License-Identifier: Apache-2.0
"""w(t) of a model on images, against the definition, and its shape on the demo's trained base."""

import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from trl_sipo.adapters import adapter_for
from trl_sipo.core.parameterization import prediction_error
from trl_sipo.demo.model import load_pipeline_assets
from trl_sipo.evaluation.importance_curve import importance_weight_curve


def test_the_curve_is_the_mean_weight_of_the_definition():
    adapter = adapter_for(tiny_stable_diffusion())
    latents = torch.randn(3, *adapter.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    prompts = ["a", "b", "c"]
    timestep = 400
    levels = adapter.noise_schedule.level(torch.tensor([timestep]))
    measured = importance_weight_curve(adapter, adapter.denoiser, latents, prompts, levels, num_steps=50, seed=7)

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    level = adapter.noise_schedule.level(torch.full((3,), timestep))
    conditioning = adapter.collate(adapter.encode_prompts(prompts))
    with torch.no_grad():
        prediction = adapter.forward(adapter.denoiser, level.add_noise(latents, noise), level, conditioning)
    alphas = adapter.noise_schedule.alphas_cumprod
    snr = alphas / (1 - alphas)
    rho_squared = snr[timestep - 20] / snr[timestep] - 1
    expected = torch.exp(-rho_squared / 2 * prediction_error(prediction, noise).double()).mean()
    assert measured == [pytest.approx(expected.item(), rel=1e-5)]


def test_the_training_mode_is_left_as_it_was():
    adapter = adapter_for(tiny_stable_diffusion())
    adapter.denoiser.train()
    levels = adapter.noise_schedule.level(torch.tensor([500]))
    importance_weight_curve(adapter, adapter.denoiser, torch.zeros(1, *adapter.latent_shape(32, 32)), ["a"], levels)
    assert adapter.denoiser.training


def test_on_the_trained_base_the_weight_rises_from_zero_to_nearly_one():
    """The shape of the SIPO paper's Fig. 4: low weights at the clean end only."""
    pipeline = load_pipeline_assets()
    adapter = adapter_for(pipeline)
    from trl_sipo.demo.fashion import COLOURS, FashionPrompt, colour_values, load_split, tint
    from trl_sipo.demo.latents import encode

    split = load_split("test")
    rows = torch.arange(0, len(split), len(split) // 16)[:16]
    colour_ids = rows % len(COLOURS)
    images = tint(split.images[rows], colour_values(colour_ids, None))
    prompts = [FashionPrompt(int(split.class_ids[row]), int(row % len(COLOURS))).text for row in rows]
    latents, _ = encode(pipeline.vae, images)
    levels = adapter.noise_schedule.level(torch.tensor([10, 200, 800]))
    low, middle, high = importance_weight_curve(adapter, pipeline.unet, latents, prompts, levels)
    assert low < 1e-6  # below one stride there is no predecessor
    assert 0.9 < middle < high
    assert high > 0.98
