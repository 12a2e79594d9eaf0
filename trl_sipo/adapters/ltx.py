# SPDX-License-Identifier: Apache-2.0
"""LTX-Video: any checkpoint whose pipeline class is `LTXPipeline`, whether or not its VAE takes a timestep."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.flow_scheduler import flow_noise_schedule, linear_mu
from trl_sipo.adapters.text_padding import pad_rows, trim_padding
from trl_sipo.adapters.transformer import check_channels
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel

_PIPELINE_MULTIPLE = 32
"""`LTXPipeline.check_inputs` asks for multiples of it, whatever the VAE."""


class LTXAdapter(BackboneAdapter):
    """Adapter of `LTXPipeline`: transformer over packed video latents, T5 text encoder with a mask, rectified flow.

    `extra["frame_rate"]`, frames per second, scales the denoiser's positions in time; a batch may hold several.
    """

    pipeline_class_name = "LTXPipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder")
    is_video = True
    frame_rate = 25.0
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    input_layer_name = "proj_in"
    vae_slice_size = 1

    def check_configuration(self) -> None:
        """Refuse transformers over other latents than the VAE's, and schedulers of another process."""
        transformer, vae = self.pipeline.transformer.config, self.pipeline.vae.config
        check_channels(
            "transformer",
            takes=transformer.in_channels,
            gives=transformer.out_channels,
            latents=vae.latent_channels,
            way_out="patched or otherwise conditioned latents, which LTXPipeline does not draw. Use a plain "
            "text-to-video checkpoint.",
        )
        _ = self.noise_schedule

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """The rectified flow at the default size; its shift grows with the number of latent tokens."""
        return self.noise_schedule_for(*self.default_size, self.default_num_frames)

    def noise_schedule_for(self, height: int, width: int, num_frames: int = 1, num_steps: int = 50) -> FlowSchedule:
        """The rectified flow with the shift that inference applies at this size. `num_steps` does not change it."""
        tokens = math.prod(self.latent_shape(height, width, num_frames)[1:])
        scheduler = self.pipeline.scheduler
        return flow_noise_schedule(scheduler, timestep_scale=1000.0, mu=linear_mu(scheduler, tokens))

    @property
    def spatial_multiple(self) -> int:
        """32 pixels for the published checkpoints, which is what one latent covers too."""
        return math.lcm(_PIPELINE_MULTIPLE, self.pipeline.vae_spatial_compression_ratio)

    @property
    def frame_multiple(self) -> int:
        """8 for the published checkpoints."""
        return self.pipeline.vae_temporal_compression_ratio

    @property
    def default_size(self) -> tuple[int, int]:
        """512 x 704."""
        return call_default(self.pipeline, "height"), call_default(self.pipeline, "width")

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Per prompt `prompt_embeds` (length, dim) and `prompt_embeds_mask` (length,), without padding."""
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder:
            embeds, mask, _, _ = self.pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_prompt_tokens,
                device=text_encoder.device,
            )
        return [{"prompt_embeds": row, "prompt_embeds_mask": kept} for row, kept in trim_padding(embeds, mask)]

    def collate(self, conditioning: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Padded to the length of inference (128 tokens)."""
        return {
            key: pad_rows([item[key] for item in conditioning], self._max_prompt_tokens) for key in conditioning[0]
        }

    @property
    def _max_prompt_tokens(self) -> int:
        return call_default(self.pipeline, "max_sequence_length")

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(128, (frames - 1) / 8 + 1, height / 32, width / 32) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        ratio = self.pipeline.vae_spatial_compression_ratio
        return (
            self.pipeline.vae.config.latent_channels,
            (num_frames - 1) // self.frame_multiple + 1,
            height // ratio,
            width // ratio,
        )

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Standardised channel by channel, by the VAE's buffers `latents_mean` and `latents_std`."""
        return self.pipeline._normalize_latents(latents, *self._channel_statistics())

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of [`normalize_latents`]."""
        return self.pipeline._denormalize_latents(latents, *self._channel_statistics())

    def _channel_statistics(self) -> tuple[Tensor, Tensor, float]:
        vae = self.pipeline.vae
        return vae.latents_mean, vae.latents_std, vae.config.scaling_factor

    def _vae_decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decoders that take a timestep are given 0, at which the pipeline adds no noise to the latents.

        Decoders of some versions (0.9.1) add noise of their own to their features, from the global generator: there
        two calls differ a little, as two calls of the pipeline do.
        """
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        return vae.decode(latents, timestep, return_dict=False)[0]

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, C, f, h, w); `prompt_embeds` is (B, tokens, dim), `prompt_embeds_mask` (B, tokens).

        `extra["frame_rate"]`: a number or a (B,) tensor; 25 where absent.
        """
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        frames, height, width = noisy_latents.shape[2:]
        packed = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents.to(dtype)),
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            timestep=level.timestep.to(device),
            encoder_attention_mask=conditioning["prompt_embeds_mask"].to(device),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self._rope_interpolation_scale((extra or {}).get("frame_rate"), device),
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(packed, frames, height, width)

    def _rope_interpolation_scale(
        self, frame_rate: float | Tensor | None, device: torch.device
    ) -> tuple[float | Tensor, int, int]:
        """Seconds per latent frame, (B, 1, 1, 1, 1) for a tensor of rates, and pixels per latent."""
        if frame_rate is None:
            frame_rate = call_default(self.pipeline, "frame_rate")
        elif isinstance(frame_rate, Tensor):
            frame_rate = frame_rate.to(device, torch.float32).view(-1, 1, 1, 1, 1)
        spatial = self.pipeline.vae_spatial_compression_ratio
        return self.pipeline.vae_temporal_compression_ratio / frame_rate, spatial, spatial
