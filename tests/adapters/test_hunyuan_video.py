# SPDX-License-Identifier: Apache-2.0
"""What is particular to HunyuanVideo: embedded guidance, odd latents, a prompt template and masked text."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.adapters.backbone_cases import PROMPTS, spied_forward
from tests.tiny.hunyuan_video import tiny_hunyuan_video
from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.errors import BackboneError, ConfigurationError

SIZE = {"height": 16, "width": 32, "num_frames": 5}


def predict(adapter: BackboneAdapter, conditioning: Conditioning, **extra) -> torch.Tensor:
    latents = torch.randn(2, *adapter.latent_shape(**SIZE), generator=torch.Generator().manual_seed(5))
    level = adapter.noise_schedule.level(torch.tensor([0.3, 0.8]))
    return adapter.forward(adapter.denoiser, latents, level, conditioning, extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 3.7])
def test_guidance_is_multiplied_and_rounded_as_in_inference(dtype, scale):
    pipeline = tiny_hunyuan_video()
    pipeline.transformer.to(dtype)
    adapter = adapter_for(pipeline)
    extra = {} if scale is None else {"guidance_scale": scale}
    with spied_forward(pipeline.transformer) as calls, torch.no_grad():
        pipeline(PROMPTS, num_inference_steps=1, output_type="latent", **SIZE, **extra)
        predict(adapter, adapter.collate(adapter.encode_prompts(PROMPTS)), **extra)
    inference, training = (call["guidance"] for call in calls)
    assert training.dtype == dtype and torch.equal(training, inference)
    assert training[0].item() == pytest.approx(1000 * (scale or 6.0), rel=1e-2)


def test_guidance_changes_the_prediction():
    adapter = adapter_for(tiny_hunyuan_video())
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    with torch.no_grad():
        default = predict(adapter, conditioning)
        assert torch.equal(default, predict(adapter, conditioning, guidance_scale=6.0))
        assert not torch.allclose(default, predict(adapter, conditioning, guidance_scale=1.0), atol=1e-4)


def test_odd_latents_are_refused_not_cropped():
    adapter = adapter_for(tiny_hunyuan_video())
    with pytest.raises(ConfigurationError, match="height 24 .*multiple of 16.*16 or 32"):
        adapter.latent_shape(24, 32, 5)
    latents, level = torch.zeros(2, 4, 2, 3, 4), adapter.noise_schedule.level(torch.ones(2) / 2)
    with torch.no_grad():
        call = {"timestep": level.timestep, "guidance": torch.full((2,), 6000.0), "return_dict": False}
        names = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
        text = zip(names, adapter.pipeline.encode_prompt(PROMPTS), strict=True)
        assert adapter.denoiser(latents, **call, **dict(text))[0].shape == (2, 4, 2, 2, 4), "it is cropped no more"


def test_prompts_are_stored_without_template_and_padding_which_do_not_reach_the_prediction():
    pipeline = tiny_hunyuan_video()
    adapter = adapter_for(pipeline)
    short, long = adapter.encode_prompts(["cat", "two dogs on a boat"])
    assert 0 < len(short["prompt_embeds"]) < len(long["prompt_embeds"]) < 30
    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    embeds, pooled, mask = pipeline.encode_prompt(PROMPTS)
    assert conditioning["prompt_embeds"].shape == embeds.shape == (2, 256, 16)
    assert torch.equal(conditioning["prompt_embeds_mask"], mask.bool())
    assert not torch.equal(conditioning["prompt_embeds"], embeds)
    whole = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "pooled_prompt_embeds": pooled}
    with torch.no_grad():
        torch.testing.assert_close(predict(adapter, conditioning), predict(adapter, whole), rtol=0, atol=1e-6)


def test_every_default_lora_layer_learns():
    adapter = adapter_for(tiny_hunyuan_video())
    targets = list(adapter.lora_target_modules)
    denoiser = get_peft_model(adapter.denoiser, LoraConfig(target_modules=targets, init_lora_weights=False))
    predict(adapter, adapter.collate(adapter.encode_prompts(PROMPTS))).square().mean().backward()
    gradients = {name: p.grad for name, p in denoiser.named_parameters() if p.requires_grad}
    assert gradients and not [name for name, grad in gradients.items() if grad is None or not grad.any()]


def test_other_pipelines_of_the_family_are_refused():
    with pytest.raises(BackboneError, match="image_condition_type='token_replace'"):
        adapter_for(tiny_hunyuan_video(image_condition_type="token_replace"))
    with pytest.raises(BackboneError, match="takes 9 channels but the VAE's latents have 4"):
        adapter_for(tiny_hunyuan_video(in_channels=9))
    with pytest.raises(BackboneError, match="computes no shift"):
        adapter_for(tiny_hunyuan_video(scheduler_options={"use_dynamic_shifting": True}))
