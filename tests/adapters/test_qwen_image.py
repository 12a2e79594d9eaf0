# SPDX-License-Identifier: Apache-2.0
"""What is particular to Qwen-Image: masks of prompts, guidance, a shift by size, transformers it does not train."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from tests.adapters.backbone_cases import PROMPTS, spied_forward
from tests.tiny.qwen_image import tiny_qwen_image
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import BackboneError


def predict(adapter, prompts: list[str], latents: torch.Tensor) -> torch.Tensor:
    level = adapter.noise_schedule.level(torch.full((len(prompts),), 0.6))
    with torch.no_grad():
        return adapter.forward(adapter.denoiser, latents, level, adapter.collate(adapter.encode_prompts(prompts)))


def test_a_prompt_is_masked_where_a_longer_one_pads_it_and_only_there():
    adapter = adapter_for(tiny_qwen_image())
    latents = torch.randn(2, *adapter.latent_shape(32, 16), generator=torch.Generator().manual_seed(0))
    with spied_forward(adapter.denoiser) as calls:
        padded = predict(adapter, PROMPTS, latents)
        alone = predict(adapter, PROMPTS[:1], latents[:1])
        equal = predict(adapter, ["a cat", "a dog"], latents)
    # Inference leaves the mask out when it has nothing to hide, and attention takes another path then.
    assert ["encoder_hidden_states_mask" in call for call in calls] == [True, False, False]
    torch.testing.assert_close(padded[:1], alone, rtol=0, atol=1e-6)
    assert (equal[0] - predict(adapter, ["a cat"], latents[:1])[0]).abs().max() < 1e-6


def test_long_prompts_are_cut_where_the_pipelines_call_cuts_them():
    """At 512 tokens; `encode_prompt` alone would keep 1024."""
    pipeline = tiny_qwen_image()
    (item,) = adapter_for(pipeline).encode_prompts(["a" * 900])
    embeds, _ = pipeline.encode_prompt(["a" * 900])
    assert embeds.shape[1] > 900
    assert item["prompt_embeds"].shape[0] == 512
    assert torch.equal(item["prompt_embeds"], embeds[0, :512])


def test_guidance_needs_a_negative_prompt_which_sampling_and_caption_dropout_give():
    """Without one the pipeline does not guide, whatever the scale."""
    pipeline = tiny_qwen_image()
    adapter = adapter_for(pipeline)
    with spied_forward(pipeline.transformer) as unguided:
        pipeline("a cat", true_cfg_scale=4.0, num_inference_steps=2, height=16, width=16, output_type="latent")
    assert len(unguided) == 2
    with spied_forward(pipeline.transformer) as guided:
        adapter.sample("a cat", 16, 16, num_inference_steps=2, guidance_scale=3.0)
    assert len(guided) == 4
    assert torch.equal(guided[1]["encoder_hidden_states"][0], adapter.null_conditioning()["prompt_embeds"])
    space, empty = adapter.encode_prompts([" ", ""])
    assert torch.equal(adapter.null_conditioning()["prompt_embeds"], space["prompt_embeds"])
    assert len(space["prompt_embeds"]) == len(empty["prompt_embeds"]) + 1


def test_half_precision_is_called_as_inference_calls_it():
    """The pipeline rounds a thousand sigmas, not sigma, which in bfloat16 differs in the last bit."""
    pipeline = tiny_qwen_image().to(torch.bfloat16)
    adapter = adapter_for(pipeline)
    steps, options = 20, {"height": 16, "width": 16, "output_type": "latent"}
    with spied_forward(pipeline.transformer) as inference:
        pipeline("a cat", true_cfg_scale=1.0, num_inference_steps=steps, **options)
    levels = [adapter.noise_schedule.level(sigma[None]) for sigma in pipeline.scheduler.sigmas[:steps]]
    conditioning = adapter.collate(adapter.encode_prompts(["a cat"]))
    latents = torch.zeros(1, *adapter.latent_shape(16, 16))
    with spied_forward(pipeline.transformer) as training, torch.no_grad():
        for level in levels:
            adapter.forward(pipeline.transformer, latents, level, conditioning)
    given, expected = (torch.cat([call["timestep"] for call in calls]) for calls in (training, inference))
    assert given.dtype == torch.bfloat16 and torch.equal(given, expected)
    assert not torch.equal(torch.cat([level.timestep for level in levels]).bfloat16(), expected)


def test_the_published_shift_grows_with_the_size():
    """`exp(mu)`, mu from 0.5 at 256 tokens to 0.9 at 8192; 1024 x 1024 are 64 x 64 tokens."""
    adapter = adapter_for(tiny_qwen_image())
    assert adapter.default_size == (1024, 1024)
    expected = math.exp(0.5 + 0.4 * (64 * 64 - 256) / (8192 - 256))
    assert adapter.noise_schedule.shift == pytest.approx(expected)
    assert adapter.noise_schedule_for(256, 256).shift == pytest.approx(math.exp(0.5))
    assert adapter.noise_schedule.shift_terminal == 0.02


UNSUPPORTED_TRANSFORMERS = {
    "guidance": ({"guidance_embeds": True}, "guidance_embeds=True.*cannot compute"),
    "layered": ({"use_additional_t_cond": True}, "use_additional_t_cond=True.*Layered"),
    "image_conditioned": ({"in_channels": 32}, "takes 32 channels but 2x2 patches of the VAE's latents have 16"),
    "other_output": ({"out_channels": 8}, "gives 32 channels"),
}


@pytest.mark.parametrize("name", UNSUPPORTED_TRANSFORMERS)
def test_transformers_that_need_more_inputs_are_refused(name):
    options, message = UNSUPPORTED_TRANSFORMERS[name]
    with pytest.raises(BackboneError, match=message):
        adapter_for(tiny_qwen_image(**options))


def test_a_scheduler_of_another_process_is_refused():
    pipeline = tiny_qwen_image()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(BackboneError, match="DDIMScheduler.*flow"):
        adapter_for(pipeline)
