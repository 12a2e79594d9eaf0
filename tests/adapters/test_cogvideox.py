# SPDX-License-Identifier: Apache-2.0
"""What is particular to CogVideoX: its shifted schedule, frames that survive the VAE, patches of two frames."""

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.adapters.backbone_cases import PROMPTS, spied_forward
from tests.tiny.cogvideox import (
    cogvideox_scheduler,
    tiny_cogvideox_2b,
    tiny_cogvideox_5b,
    tiny_cogvideox_15,
    tiny_cogvideox_transformer,
)
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import BackboneError, ConfigurationError

each_version = pytest.mark.parametrize("build", [tiny_cogvideox_2b, tiny_cogvideox_5b, tiny_cogvideox_15])
SIZE = {"height": 16, "width": 32}


def videos(frames: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, frames, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


# The schedule


def shifted_alphas_cumprod(snr_shift_scale: float) -> Tensor:
    """The signal-to-noise ratio of Stable Diffusion's betas divided by the scale, then rescaled to end at zero."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    plain = torch.cumprod(1 - roots**2, dim=0)
    snr = plain / (1 - plain) / snr_shift_scale
    root = (snr / (1 + snr)).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_signal_to_noise_ratio_is_shifted_and_ends_at_zero(scale):
    pipeline = tiny_cogvideox_2b(scheduler=cogvideox_scheduler(scale))
    table = adapter_for(pipeline).noise_schedule.alphas_cumprod
    torch.testing.assert_close(table, shifted_alphas_cumprod(scale), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(table, pipeline.scheduler.alphas_cumprod, rtol=0, atol=0)
    assert table[-1] == 0 < table[-2]


def test_the_shift_is_read_from_the_configuration_whatever_the_sampler():
    """DDIM's own table ignores the shift, which stays in its configuration: the model was trained with it."""
    pipeline = tiny_cogvideox_2b()
    for sampler in (CogVideoXDPMScheduler, DDIMScheduler):
        pipeline.scheduler = sampler.from_config(cogvideox_scheduler().config)
        table = adapter_for(pipeline).noise_schedule.alphas_cumprod
        torch.testing.assert_close(table, shifted_alphas_cumprod(3.0), rtol=1e-9, atol=1e-15)
    assert abs(pipeline.scheduler.alphas_cumprod[500] - shifted_alphas_cumprod(3.0)[500]) > 0.1


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_configurations_without_the_shift_are_refused(scheduler):
    with pytest.raises(BackboneError, match=f"{type(scheduler).__name__} has no snr_shift_scale"):
        adapter_for(tiny_cogvideox_2b(scheduler=scheduler))


def test_the_state_of_the_scheduler_is_not_read():
    pipeline = tiny_cogvideox_2b()
    pipeline.scheduler.alphas_cumprod.fill_(0.5)
    table = adapter_for(pipeline).noise_schedule.alphas_cumprod
    torch.testing.assert_close(table, shifted_alphas_cumprod(3.0), rtol=1e-9, atol=1e-15)


# Frames


@each_version
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_valid_frames_survive_the_vae(build, frames):
    adapter = adapter_for(build())
    latents = adapter.encode_media(videos(frames, batch=1))
    assert latents.shape[1:] == adapter.latent_shape(16, 32, frames)
    assert adapter.decode(latents).shape[2] == frames


@pytest.mark.parametrize("frames, decoded, nearest", [(5, 8, "1 or 9"), (8, 8, "1 or 9"), (13, 16, "9 or 17")])
def test_frames_that_would_decode_to_others_are_refused(frames, decoded, nearest):
    adapter = adapter_for(tiny_cogvideox_5b())
    with pytest.raises(ConfigurationError, match=f"num_frames {frames} .*multiple of 8.*Nearest valid: {nearest}"):
        adapter.latent_shape(16, 32, frames)
    if frames % 4 == 1:  # a count that gives whole latents, whose decoded length is another one
        assert adapter.decode(adapter.encode_media(videos(frames, batch=1))).shape[2] == decoded


@each_version
def test_images_are_single_frames_as_in_inference(build):
    pipeline = build()
    adapter = adapter_for(pipeline)
    options = {"num_frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    with spied_forward(adapter.denoiser) as inference:
        frames = pipeline(PROMPTS, **SIZE, **options, generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (2, 1, 3, 16, 32)

    conditioning = adapter.collate(adapter.encode_prompts(PROMPTS))
    level = adapter.noise_schedule.level(inference[0]["timestep"])
    noisy = inference[0]["hidden_states"].transpose(1, 2)
    assert noisy.shape == adapter.encode_media(videos(1)[:, :, 0]).shape
    with spied_forward(adapter.denoiser) as training, torch.no_grad():
        assert adapter.forward(adapter.denoiser, noisy, level, conditioning).shape == noisy.shape
    assert training[0].keys() == inference[0].keys()
    for name, value in inference[0].items():
        torch.testing.assert_close(training[0][name], value, rtol=0, atol=0, msg=name)


def test_15_repeats_the_first_latent_frame_and_drops_it_when_it_decodes():
    adapter = adapter_for(tiny_cogvideox_15())
    latents = adapter.encode_media(videos(9))
    assert latents.shape == (2, *adapter.latent_shape(16, 32, 9)) == (2, 4, 4, 2, 4)
    assert torch.equal(latents[:, :, 0], latents[:, :, 1])
    torch.testing.assert_close(latents[:, :, 1:], adapter_for(tiny_cogvideox_5b()).encode_media(videos(9)))
    other = latents.clone()
    other[:, :, 0] = 0
    assert torch.equal(adapter.decode(other), adapter.decode(latents))


# The transformer


def test_rotary_embeddings_are_those_of_the_size():
    adapter = adapter_for(tiny_cogvideox_5b())
    level = adapter.noise_schedule.level(torch.tensor([7]))
    conditioning = adapter.collate(adapter.encode_prompts(["a"]))
    for height, width in ((16, 32), (32, 16)):
        latents = torch.zeros(1, *adapter.latent_shape(height, width, 9))
        with spied_forward(adapter.denoiser) as calls, torch.no_grad():
            adapter.forward(adapter.denoiser, latents, level, conditioning)
        expected = adapter.pipeline._prepare_rotary_positional_embeddings(height, width, 3, torch.device("cpu"))
        for actual, part in zip(calls[0]["image_rotary_emb"], expected, strict=True):
            assert torch.equal(actual, part)


def test_odd_latent_sizes_which_the_transformer_would_crop_are_refused():
    adapter = adapter_for(tiny_cogvideox_5b())
    with pytest.raises(ConfigurationError, match="width 24 .* multiple of 16.*Nearest valid: 16 or 32"):
        adapter.latent_shape(16, 24, 9)


UNSUPPORTED = {
    "image_to_video": ({"in_channels": 8}, "takes 8 channels but the VAE's latents have 4"),
    "offset": ({"ofs_embed_dim": 8, "use_rotary_positional_embeddings": True}, "ofs_embed_dim=8"),
    "frame_patches": ({"patch_size_t": 4, "use_rotary_positional_embeddings": True}, "patch_size_t=4"),
    "prompt_length": ({"max_text_seq_length": 24}, "exactly 24 tokens, but CogVideoXPipeline encodes them to 226"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_transformers_that_cannot_be_trained_are_refused(name):
    options, message = UNSUPPORTED[name]
    with pytest.raises(BackboneError, match=message):
        adapter_for(tiny_cogvideox_2b(transformer=tiny_cogvideox_transformer(**options)))
