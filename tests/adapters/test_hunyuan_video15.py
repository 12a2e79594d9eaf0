# SPDX-License-Identifier: Apache-2.0
"""What is particular to HunyuanVideo-1.5: glyphs, inputs for a missing image, and text layers that do not learn."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.adapters.backbone_cases import PROMPTS, spied_forward
from tests.tiny.hunyuan_video15 import tiny_hunyuan_video15
from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.errors import BackboneError

SIZE = {"height": 16, "width": 24, "num_frames": 5}
GLYPHS = ['a sign that says "open"', "a cat"]


def predict(adapter: BackboneAdapter, denoiser: nn.Module, conditioning: Conditioning | None = None) -> Tensor:
    latents = torch.randn(2, *adapter.latent_shape(**SIZE), generator=torch.Generator().manual_seed(5))
    level = adapter.noise_schedule.level(torch.tensor([0.3, 0.8]))
    conditioning = conditioning or adapter.collate(adapter.encode_prompts(GLYPHS))
    return adapter.forward(denoiser, latents, level, conditioning)


# Prompts


def test_text_to_be_drawn_is_read_by_the_second_encoder_as_in_inference():
    pipeline = tiny_hunyuan_video15()
    adapter = adapter_for(pipeline)
    items = adapter.encode_prompts(GLYPHS)
    assert [len(item["prompt_embeds_2"]) for item in items] == [len('Text "open". ') + 1, 0]
    with spied_forward(pipeline.transformer) as calls, torch.no_grad():
        pipeline(GLYPHS, num_inference_steps=1, output_type="latent", **SIZE)
        predict(adapter, adapter.denoiser, adapter.collate(items))
    inference, training = calls
    for suffix in ("", "_2"):
        mask = inference[f"encoder_attention_mask{suffix}"]
        assert torch.equal(training[f"encoder_attention_mask{suffix}"], mask)
        expected = inference[f"encoder_hidden_states{suffix}"] * mask[..., None]
        assert torch.equal(training[f"encoder_hidden_states{suffix}"], expected)


def test_what_stands_in_the_padding_does_not_reach_the_prediction():
    pipeline = tiny_hunyuan_video15()
    adapter = adapter_for(pipeline)
    conditioning = adapter.collate(adapter.encode_prompts(GLYPHS))
    whole = dict(zip(conditioning, pipeline.encode_prompt(GLYPHS, batch_size=2), strict=True))
    assert not torch.equal(conditioning["prompt_embeds"], whole["prompt_embeds"])
    with torch.no_grad():
        predictions = [predict(adapter, adapter.denoiser, given) for given in (conditioning, whole)]
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


def test_lengths_are_those_of_the_pipeline():
    """The tiny pipeline is told to pad less; one that was loaded is not."""
    adapter = adapter_for(tiny_hunyuan_video15())
    conditioning = adapter.collate(adapter.encode_prompts(GLYPHS))
    with torch.no_grad():
        expected = predict(adapter, adapter.denoiser, conditioning)
    adapter.pipeline.tokenizer_max_length, adapter.pipeline.tokenizer_2_max_length = 1000, 256
    adapter.pipeline.vision_num_semantic_tokens = 729
    published = adapter.collate(adapter.encode_prompts(GLYPHS))
    assert published["prompt_embeds"].shape[1] == 1000 and published["prompt_embeds_mask_2"].shape[1] == 256
    with torch.no_grad():
        torch.testing.assert_close(predict(adapter, adapter.denoiser, published), expected, rtol=0, atol=1e-6)


# Denoiser and VAE


def test_everything_has_the_dtype_of_the_denoiser():
    """The timestep too, from whose dtype that of the time embedding follows."""
    adapter = adapter_for(tiny_hunyuan_video15())
    adapter.denoiser.to(torch.bfloat16)
    with spied_forward(adapter.denoiser) as calls, torch.no_grad():
        predict(adapter, adapter.denoiser)
    dtypes = {name: value.dtype for name, value in calls[0].items() if isinstance(value, Tensor)}
    assert len(dtypes) == 7 and set(dtypes.values()) == {torch.bfloat16}


def test_the_vae_takes_one_video_at_a_time():
    """If this fails, diffusers has corrected the mask, and `vae_slice_size` may be larger."""
    adapter = adapter_for(tiny_hunyuan_video15())
    adapter.pipeline.vae.disable_slicing()
    videos = torch.rand(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad(), pytest.raises(RuntimeError, match="broadcast shape"):
        adapter.pipeline.vae.encode(videos)
    assert adapter.decode(adapter.encode_media(videos)).shape == videos.shape


def test_the_default_size_is_the_pipelines_16_to_9_format():
    height, width = adapter_for(tiny_hunyuan_video15()).default_size
    assert (height, width) == (24, 40)


def test_other_models_of_the_family_are_refused():
    with pytest.raises(BackboneError, match="in_channels=4, but the VAE's latents of 4 channels need 9"):
        adapter_for(tiny_hunyuan_video15(in_channels=4))
    with pytest.raises(BackboneError, match="computes no shift"):
        adapter_for(tiny_hunyuan_video15(scheduler_options={"use_dynamic_shifting": True}))


# LoRA


def test_every_default_lora_layer_learns_and_the_last_text_layers_would_not():
    def dead_layers(targets: list[str]) -> set[str]:
        adapter = adapter_for(tiny_hunyuan_video15())
        denoiser = get_peft_model(adapter.denoiser, LoraConfig(target_modules=targets, init_lora_weights=False))
        predict(adapter, denoiser, adapter.collate(adapter.encode_prompts(PROMPTS))).square().mean().backward()
        lora = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        assert lora and all(p.grad is None or p.grad.isfinite().all() for p in lora.values())
        return {name.split(".lora_")[0] for name, p in lora.items() if p.grad is None or not p.grad.any()}

    adapter = adapter_for(tiny_hunyuan_video15())
    assert not dead_layers(list(adapter.lora_target_modules))
    last = "base_model.model.transformer_blocks.1.attn"
    assert dead_layers(["add_q_proj", "to_add_out"]) == {f"{last}.add_q_proj", f"{last}.to_add_out"}
