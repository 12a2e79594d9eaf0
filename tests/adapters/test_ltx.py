# SPDX-License-Identifier: Apache-2.0
"""What is particular to LTX-Video: its frame rate, its shift, its text mask and the VAEs that take a timestep."""

import math

import pytest
import torch
from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS
from tests.tiny.ltx import tiny_ltx
from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.errors import BackboneError, ConfigurationError

SIZE = (32, 64, 17)


def predict(adapter: BackboneAdapter, rows: slice = slice(None), **extra) -> Tensor:
    """Predictions for `PROMPTS`, or those of some rows alone."""
    latents = torch.randn(2, *adapter.latent_shape(*SIZE), generator=torch.Generator().manual_seed(5))[rows]
    level = adapter.noise_schedule.level(torch.tensor([0.3, 0.8])[rows])
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS[rows]))
    with torch.no_grad():
        return adapter.forward(adapter.denoiser, latents, level, conditioning, extra)


def test_the_frame_rate_is_that_of_the_pipelines_call_where_none_is_given():
    adapter = adapter_for(tiny_ltx())
    default = predict(adapter)
    assert torch.equal(default, predict(adapter, frame_rate=25))
    assert not torch.allclose(default, predict(adapter, frame_rate=8), atol=1e-4)


def test_every_sample_may_have_a_frame_rate_of_its_own():
    adapter = adapter_for(tiny_ltx())
    mixed = predict(adapter, frame_rate=torch.tensor([8.0, 30.0]))
    for index, rate in enumerate((8, 30)):
        alone = predict(adapter, slice(index, index + 1), frame_rate=rate)
        torch.testing.assert_close(mixed[index : index + 1], alone, rtol=0, atol=1e-6)
    common = predict(adapter, frame_rate=torch.tensor([8.0, 8.0]))
    torch.testing.assert_close(common, predict(adapter, frame_rate=8), rtol=0, atol=1e-6)


def test_the_shift_of_the_default_size_is_that_of_the_published_scheduler():
    """512 x 704 x 161 are 16 * 22 * 21 tokens; mu goes from 0.95 at 1024 to 2.05 at 4096 of them, and on."""
    adapter = adapter_for(tiny_ltx())
    assert (*adapter.default_size, adapter.default_num_frames) == (512, 704, 161)
    mu = 0.95 + (2.05 - 0.95) * (16 * 22 * 21 - 1024) / (4096 - 1024)
    assert adapter.noise_schedule.shift == pytest.approx(math.exp(mu))
    assert adapter.noise_schedule.shift_terminal == 0.1
    assert adapter.noise_schedule_for(32, 32, 1).shift < adapter.noise_schedule.shift


def test_what_stands_in_the_padding_does_not_reach_the_prediction():
    """The pipeline's embeddings of the padding are not zero, as those of the adapter are."""
    pipeline = tiny_ltx()
    adapter = adapter_for(pipeline)
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    embeds, mask, _, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert conditioning["prompt_embeds"].shape == embeds.shape == (2, 128, 16)
    assert torch.equal(conditioning["prompt_embeds_mask"], mask)
    assert not torch.equal(conditioning["prompt_embeds"], embeds)
    whole = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
    latents, level = torch.ones(2, *adapter.latent_shape(*SIZE)), adapter.noise_schedule.level(torch.ones(2) / 2)
    with torch.no_grad():
        predictions = [adapter.forward(adapter.denoiser, latents, level, given) for given in (conditioning, whole)]
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


def test_a_vae_that_takes_a_timestep_is_given_zero():
    adapter = adapter_for(tiny_ltx(vae_options={"timestep_conditioning": True}))
    latents = torch.randn(2, *adapter.latent_shape(*SIZE), generator=torch.Generator().manual_seed(0))
    raw = adapter.denormalize_latents(latents)
    with torch.no_grad():
        at_zero, at_some = (adapter.pipeline.vae.decode(raw, torch.full((2,), t)).sample for t in (0.0, 0.05))
    torch.testing.assert_close(adapter.decode(latents), at_zero.clamp(-1, 1), rtol=0, atol=1e-5)
    assert (at_zero - at_some).abs().max() > 1e-3


def test_sizes_in_the_messages_are_those_of_the_video_vae():
    adapter = adapter_for(tiny_ltx())
    with pytest.raises(ConfigurationError, match="height 48 .*multiple of 32.*32 or 64"):
        adapter.validate_size(48, 64, 9)
    with pytest.raises(ConfigurationError, match="num_frames 16 .*9 or 17"):
        adapter.validate_size(32, 64, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 8}, "takes 8 channels but the VAE's latents have 4"),
        ({"out_channels": 8}, "gives 8 channels"),
    ],
)
def test_transformers_over_other_latents_are_refused(options, message):
    with pytest.raises(BackboneError, match=message):
        adapter_for(tiny_ltx(**options))
