# SPDX-License-Identifier: Apache-2.0
"""What is particular to Z-Image: lists in place of batches, time that runs backwards, prompts that are rewritten."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from tests.adapters.backbone_cases import PROMPTS, spied_forward
from tests.tiny.z_image import tiny_z_image
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import BackboneError


def test_the_list_of_prompts_is_left_as_it_was():
    """The pipeline's own `encode_prompt` writes the chat template into the list that it is given."""
    pipeline = tiny_z_image()
    prompts, rewritten = list(PROMPTS), list(PROMPTS)
    pipeline.encode_prompt(rewritten, do_classifier_free_guidance=False)
    assert rewritten != PROMPTS
    adapter_for(pipeline).encode_prompts(prompts)
    assert prompts == PROMPTS


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_other_steps_of_the_sampler_are_steps_through_the_same_process(option):
    """The grid of the importance weights stays the plain one."""
    pipeline, plain = tiny_z_image(scheduler_options={option: True}), tiny_z_image()
    for each in (pipeline, plain):
        each.scheduler.set_timesteps(10)
    assert not torch.allclose(pipeline.scheduler.sigmas, plain.scheduler.sigmas, atol=1e-2)
    schedules = [adapter_for(each).noise_schedule for each in (pipeline, plain)]
    levels = [schedule.previous_level(schedule.level_at(torch.linspace(0, 1, 11)), 10) for schedule in schedules]
    assert torch.equal(levels[0].sigma_t, levels[1].sigma_t)


def test_the_denoiser_sees_no_padding_of_prompts():
    """It would attend it: only what the transformer pads itself is marked as padding."""
    adapter = adapter_for(tiny_z_image())
    items = adapter.encode_prompts(PROMPTS)
    lengths = [len(item["prompt_embeds"]) for item in items]
    assert lengths[0] < lengths[1]
    latents = torch.randn(2, *adapter.latent_shape(16, 24), generator=torch.Generator().manual_seed(0))
    level = adapter.noise_schedule.level(torch.tensor([0.6, 0.6]))
    with spied_forward(adapter.denoiser) as calls, torch.no_grad():
        together = adapter.forward(adapter.denoiser, latents, level, adapter.collate(items))
        # Padded further than the longest prompt, as in a batch that was cut in two.
        wider = {key: torch.cat([row, row[:, :9] * 0], dim=1) for key, row in adapter.collate(items).items()}
        assert torch.equal(adapter.forward(adapter.denoiser, latents, level, wider), together)
        first = adapter.noise_schedule.level(torch.tensor([0.6]))
        alone = adapter.forward(adapter.denoiser, latents[:1], first, adapter.collate(items[:1]))
    assert [len(prompt) for prompt in calls[0]["cap_feats"]] == lengths
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)


def test_long_prompts_are_cut_where_inference_cuts_them():
    (item,) = adapter_for(tiny_z_image()).encode_prompts(["a" * 900])
    assert item["prompt_embeds"].shape[0] == item["prompt_embeds_mask"].sum() == 512


def test_time_runs_backwards_inside_the_denoiser_and_keeps_its_precision():
    """The denoiser's time is 0 at the noise end, float32 whatever the weights; its output points to the data."""
    pipeline = tiny_z_image()
    adapter = adapter_for(pipeline)
    pipeline.transformer.to(torch.bfloat16)
    latents = torch.zeros(2, *adapter.latent_shape(16, 16))
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    level = adapter.noise_schedule.level(torch.tensor([1.0, 0.25]))
    output = []
    pipeline.transformer.register_forward_hook(lambda _module, _inputs, result: output.extend(result[0]))
    with spied_forward(pipeline.transformer) as calls, torch.no_grad():
        prediction = adapter.forward(pipeline.transformer, latents, level, conditioning)
    assert calls[0]["t"].dtype == torch.float32 and calls[0]["t"].tolist() == [0.0, 0.75]
    assert prediction.dtype == torch.bfloat16
    assert torch.equal(prediction, torch.stack([-one[:, 0] for one in output]))


def test_the_shift_depends_on_the_size_only_where_the_scheduler_says_so():
    static = adapter_for(tiny_z_image())
    assert static.noise_schedule.shift == static.noise_schedule_for(16, 16).shift == 3.0
    dynamic = adapter_for(tiny_z_image(scheduler_options={"use_dynamic_shifting": True}))
    assert dynamic.default_size == (1024, 1024)  # 128 x 128 tokens: the tiny VAE's factor is 4
    assert dynamic.noise_schedule.shift == pytest.approx(math.exp(0.5 + 0.65 * (128 * 128 - 256) / (4096 - 256)))
    assert dynamic.noise_schedule_for(128, 128).shift == pytest.approx(math.exp(0.5))  # 16 x 16 tokens


def test_transformers_of_other_latents_are_refused():
    with pytest.raises(BackboneError, match="takes 8 channels but the VAE's latents have 4"):
        adapter_for(tiny_z_image(in_channels=8))


def test_a_scheduler_of_another_process_is_refused():
    pipeline = tiny_z_image()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(BackboneError, match="DDIMScheduler.*flow"):
        adapter_for(pipeline)
