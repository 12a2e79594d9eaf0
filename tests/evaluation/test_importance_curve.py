# SPDX-License-Identifier: Apache-2.0
"""w(t) of a model on images, against the definition, and its shape on the demo's trained base."""

import pytest
import torch

from tests.oracles import sd15_profile
from tests.tiny_models import tiny_stable_diffusion
from trl_sipo.adapters import adapter_for
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.core.parameterization import prediction_error, prediction_target
from trl_sipo.core.precision import per_sample
from trl_sipo.demo.model import load_pipeline_assets
from trl_sipo.evaluation.importance_curve import (
    PairWeights,
    importance_weight_curve,
    masked_regions,
    pair_weights,
    stratum_midpoints,
)
from trl_sipo.trainer.encoding import EncodedPairs


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


class OfKnownError:
    """An adapter whose denoiser errs on clean latents of zeros by exactly what `error_at(level)` says.

    Of zeros, the noise is x_t / sigma_t, so that the target is known to it; the error is the same in every dimension.
    """

    def __init__(self, schedule, prediction_type, error_at):
        self.noise_schedule, self.prediction_type, self.error_at = schedule, prediction_type, error_at

    def forward(self, denoiser, noisy_latents, level, conditioning, extra=None):
        noise = noisy_latents / per_sample(level.sigma_t, noisy_latents)
        target = prediction_target(torch.zeros_like(noise), noise, level, self.prediction_type)
        return target + per_sample(self.error_at(level).sqrt(), target)


def _sd15_error(prediction_type):
    """The published epsilon errors of SD1.5, at the same log-SNR, in another parameterisation."""

    def error_at(level):
        epsilon = torch.from_numpy(sd15_profile.epsilon_error_at_log_snr(level.log_snr.double().numpy())).float()
        return epsilon if prediction_type == "epsilon" else epsilon / level.alpha_t**2

    return error_at


def _known_weights(adapter, num_levels, num_pairs=3):
    levels = adapter.noise_schedule.level_at(stratum_midpoints(num_levels))
    zeros = torch.zeros(num_pairs, 4, 4, 4)
    noise = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(1))
    pairs = EncodedPairs(zeros, zeros, {})
    weights = pair_weights(adapter, torch.nn.Identity(), pairs, noise, levels, schedule=adapter.noise_schedule)
    return levels, weights


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_known_error_masks_the_published_timesteps(prediction_type):
    """w < 0.9 up to t = 63 at least and t = 68 at most, whatever the network predicts."""
    schedule = VPSchedule(sd15_profile.alphas_cumprod())
    adapter = OfKnownError(schedule, prediction_type, _sd15_error(prediction_type))
    levels, weights = _known_weights(adapter, 1000)
    assert levels.timestep.tolist() == list(range(1000))
    masked = weights.pair.exp() < 0.9
    assert (masked == masked[:, :1]).all()  # the error does not depend on the noise
    cut = int(masked[:, 0].nonzero().max())
    assert masked[: cut + 1].all() and 66 <= cut <= 68
    assert weights.pair[100].exp().tolist() == pytest.approx([0.943] * 3, abs=1e-3)
    assert torch.equal(weights.chosen, weights.rejected)


@pytest.mark.parametrize(("shift", "cut"), [(1.0, 0.152), (3.0, 0.259), (5.0, 0.321)])
def test_a_known_error_masks_the_sigmas_of_its_shift(shift, cut):
    adapter = OfKnownError(FlowSchedule(shift), "flow_prediction", _sd15_error("flow_prediction"))
    levels, weights = _known_weights(adapter, 4000, num_pairs=1)
    # Beyond the first region: the profile ends at sigma = 0.93, where its last epsilon error, held constant, is large
    # for a velocity.
    start, end = masked_regions(stratum_midpoints(4000).tolist(), weights.pair.exp()[:, 0].tolist(), 0.9)[0]
    assert start == 0
    assert adapter.noise_schedule.level_at(torch.tensor([end])).sigma_t.item() == pytest.approx(cut, abs=0.0015)


def test_fifty_levels_find_the_cut_to_within_their_spacing():
    adapter = OfKnownError(VPSchedule(sd15_profile.alphas_cumprod()), "epsilon", _sd15_error("epsilon"))
    _, weights = _known_weights(adapter, 50)
    ((start, end),) = masked_regions(stratum_midpoints(50).tolist(), weights.pair.exp()[:, 0].tolist(), 0.9)
    assert start == 0 and end == pytest.approx(0.068, abs=0.01)


def test_the_arms_of_a_pair_keep_their_own_errors():
    """Rejected latents that are no zeros: the pair takes the smaller of the two weights."""
    adapter = OfKnownError(FlowSchedule(3.0), "flow_prediction", lambda level: torch.full_like(level.sigma_t, 0.1))
    chosen, rejected = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    noise = torch.zeros(chosen.shape)
    levels = adapter.noise_schedule.level(torch.tensor([0.5, 0.8]))
    pairs = EncodedPairs(chosen, rejected, {})
    first, second = (
        pair_weights(adapter, torch.nn.Identity(), arms, noise, levels, schedule=adapter.noise_schedule)
        for arms in (pairs, EncodedPairs(rejected, chosen, {}))
    )
    assert torch.allclose(first.chosen_error, torch.tensor(0.1)) and (first.rejected_error > 0.5).all()
    assert torch.equal(first.pair, first.rejected) and (first.pair < first.chosen).all()
    assert torch.equal(first.pair, second.pair) and torch.equal(first.chosen, second.rejected)
    joined = PairWeights.join([first, second])
    assert torch.equal(joined.chosen, torch.cat([first.chosen, second.chosen], dim=1))


@pytest.mark.parametrize(
    ("weights", "regions"),
    [
        ([1.0, 1.0, 1.0, 1.0], []),
        ([0.1, 0.2, 0.3, 0.4], [(0.0, 1.0)]),
        ([0.8, 1.0, 1.0, 1.0], [(0.0, 0.25)]),
        ([1.0, 1.0, 1.0, 0.8], [(0.75, 1.0)]),
        ([1.0, 0.8, 0.8, 1.0], [(0.25, 0.75)]),
        ([0.8, 1.0, 0.8, 1.0], [(0.0, 0.25), (0.5, 0.75)]),
        ([0.9, 0.9, 0.9, 0.9], []),
    ],
    ids=str,
)
def test_masked_regions(weights, regions):
    found = masked_regions([0.125, 0.375, 0.625, 0.875], weights, 0.9)
    assert [edge for region in found for edge in region] == pytest.approx([edge for pair in regions for edge in pair])


def test_masked_regions_of_a_part_of_the_schedule_or_of_no_levels():
    assert masked_regions([0.4, 0.5], [0.8, 0.8], 0.9, within=(0.35, 0.55)) == [(0.35, 0.55)]
    assert masked_regions([], [], 0.9) == []
