# SPDX-License-Identifier: Apache-2.0
"""What is particular to Stable Diffusion 3: T5 that may be missing, its table of positions, and its shift."""

import pytest
import torch
from diffusers import DDIMScheduler, SD3Transformer2DModel

from tests.adapters.backbone_cases import PROMPTS, spied_forward
from tests.tiny.stable_diffusion_3 import TEXT_DIM, tiny_stable_diffusion_3, tiny_stable_diffusion_3_5
from tests.tiny_models import TOKENS
from trl_sipo.adapters import adapter_for, load_pipeline
from trl_sipo.errors import BackboneError, ConfigurationError


def test_prompts_have_clips_tokens_and_then_256_of_t5():
    adapter = adapter_for(tiny_stable_diffusion_3())
    assert adapter.encode_prompts([]) == []
    for item in adapter.encode_prompts(["", "a red cat " * 40]):
        assert item["prompt_embeds"].shape == (TOKENS + 256, TEXT_DIM)
        assert item["pooled_prompt_embeds"].shape == (8 + 12,)
        assert item["prompt_embeds"][TOKENS:].any()


def test_the_dropout_of_t5_is_off():
    pipeline = tiny_stable_diffusion_3()
    adapter = adapter_for(pipeline)
    expected = adapter.encode_prompts(PROMPTS)
    pipeline.text_encoder_3.train()
    for item, other in zip(adapter.encode_prompts(PROMPTS), expected, strict=True):
        assert torch.equal(item["prompt_embeds"], other["prompt_embeds"])


def test_a_pipeline_without_t5_is_given_zeros_and_keeps_everything_else(tmp_path):
    with_t5, without = (adapter_for(tiny_stable_diffusion_3(with_t5=has_t5)) for has_t5 in (True, False))
    (full,), (item,) = (adapter.encode_prompts(["a cat"]) for adapter in (with_t5, without))
    assert item["prompt_embeds"].shape == full["prompt_embeds"].shape
    assert not item["prompt_embeds"][TOKENS:].any() and item["prompt_embeds"][:TOKENS].any()

    without.freeze()
    without.save_pipeline(tmp_path)
    loaded = adapter_for(load_pipeline(tmp_path))
    assert loaded.pipeline.text_encoder_3 is None and loaded.pipeline.tokenizer_3 is None
    assert torch.equal(loaded.encode_prompts(["a cat"])[0]["prompt_embeds"], item["prompt_embeds"])


def test_t5_without_its_tokenizer_is_refused():
    pipeline = tiny_stable_diffusion_3()
    pipeline.tokenizer_3 = None
    with pytest.raises(BackboneError, match="text_encoder_3.*no tokenizer_3. Load both, or neither"):
        adapter_for(pipeline)


def test_sizes_beyond_the_table_of_positions_are_refused_with_the_largest():
    """Six positions of two latents of four pixels a side."""
    adapter = adapter_for(tiny_stable_diffusion_3())
    shape = adapter.latent_shape(48, 16)
    level = adapter.noise_schedule.level(torch.tensor([0.5]))
    conditioning = adapter.collate([adapter.null_conditioning()])
    with torch.no_grad():
        assert adapter.forward(adapter.denoiser, torch.zeros(1, *shape), level, conditioning).shape == (1, *shape)
        with pytest.raises(ValueError, match="pos_embed_max_size"):
            adapter.forward(adapter.denoiser, torch.zeros(1, 4, 14, 4), level, conditioning)
    for size in ((56, 16), (16, 56)):
        with pytest.raises(ConfigurationError, match=r"(height|width) 56 .*pos_embed_max_size=6.*Largest valid: 48\."):
            adapter.latent_shape(*size)


def test_odd_latent_sizes_are_refused_since_the_transformer_crops_them_in_silence():
    adapter = adapter_for(tiny_stable_diffusion_3())
    level = adapter.noise_schedule.level(torch.tensor([0.5]))
    conditioning = adapter.collate([adapter.null_conditioning()])
    with torch.no_grad():
        cropped = adapter.forward(adapter.denoiser, torch.zeros(1, 4, 5, 8), level, conditioning)
    assert cropped.shape == (1, 4, 4, 8)
    with pytest.raises(ConfigurationError, match="height 20 .* multiple of 8.*Nearest valid: 16 or 24"):
        adapter.latent_shape(20, 32)


def test_the_published_shift_is_three_at_every_size():
    adapter = adapter_for(tiny_stable_diffusion_3())
    assert adapter.noise_schedule.shift == 3.0 and adapter.noise_schedule.timestep_scale == 1000.0
    assert adapter.noise_schedule_for(16, 48).shift == 3.0


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_a_dynamic_shift_is_the_one_of_inference_at_each_size(size):
    """With limits that make the shifts of these small sizes differ: 16 and 12 tokens."""
    options = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 20, "max_shift": 1.6}
    pipeline = tiny_stable_diffusion_3(scheduler_options=options)
    adapter = adapter_for(pipeline)
    height, width = size
    with spied_forward(pipeline.transformer) as calls:
        pipeline("a", height=height, width=width, num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    sigmas = torch.cat([call["timestep"] for call in calls]) / 1000
    unshifted = torch.linspace(1, 1 / 1000, 4)
    schedule = adapter.noise_schedule_for(height, width)
    torch.testing.assert_close(schedule.level_at(unshifted).sigma_t, sigmas, rtol=1e-4, atol=1e-6)
    is_default = size == adapter.default_size
    assert (schedule.shift == adapter.noise_schedule.shift) == is_default


def test_schedulers_of_another_process_are_refused():
    pipeline = tiny_stable_diffusion_3()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(BackboneError, match="DDIMScheduler.*flow"):
        adapter_for(pipeline)


@pytest.mark.parametrize("option", ["in_channels", "out_channels"])
def test_transformers_of_other_channels_are_refused(option):
    pipeline = tiny_stable_diffusion_3()
    pipeline.transformer = SD3Transformer2DModel.from_config(pipeline.transformer.config, **{option: 8})
    with pytest.raises(BackboneError, match="8 channels but the VAE's latents have 4"):
        adapter_for(pipeline)


def test_the_layers_of_lora_are_those_of_the_joint_attention():
    """Eight a block, less `to_add_out` of the last, whose text stream ends there; not 3.5's second attention."""
    adapter = adapter_for(tiny_stable_diffusion_3_5())
    names = [name for name, _ in adapter.denoiser.named_modules()]
    targets = [name for name in names if name.endswith(tuple(f".{end}" for end in adapter.lora_target_modules))]
    assert len(targets) == 2 * 8 - 1
    assert any(".attn2." in name for name in names) and not any(".attn2." in name for name in targets)
