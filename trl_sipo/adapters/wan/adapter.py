# SPDX-License-Identifier: Apache-2.0
"""Wan with one transformer: Wan 2.1, and TI2V-5B of Wan 2.2."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.flow_scheduler import check_static_shift, flow_noise_schedule
from trl_sipo.adapters.transformer import channel_statistics, check_channels
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel
from trl_sipo.errors import BackboneError


class WanAdapter(BackboneAdapter):
    """Adapter of `WanPipeline` with one transformer: flow matching, a UMT5 text encoder, a causal video VAE.

    Images are single frames. Keep the VAE in float32, as the published examples do; the rest may be bfloat16.
    """

    pipeline_class_name = "WanPipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder")
    is_video = True
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    input_layer_name = "patch_embedding"
    vae_slice_size = 1

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        if self.pipeline.config.expand_timesteps:
            self.frame_rate = 24.0  # of TI2V-5B; the others' videos play at 16

    def check_configuration(self) -> None:
        """Refuse transformers that need an image, and schedulers of another process."""
        for name in self._transformer_names:
            self._check_transformer(name)
        check_static_shift(self.pipeline, "the shift of the resolution (flow_shift)")
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.noise_schedule

    @property
    def _transformer_names(self) -> list[str]:
        """The pipeline's transformers that are loaded; all of one architecture."""
        return [self.denoiser_name]

    def _check_transformer(self, name: str) -> None:
        config = getattr(self.pipeline, name).config
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            raise BackboneError(f"The {name} is conditioned on an image. Use a text-to-video checkpoint.")
        check_channels(
            name,
            takes=config.in_channels,
            gives=config.out_channels or config.in_channels,
            latents=self.pipeline.vae.config.z_dim,
            way_out="an image-to-video or control model. Use a text-to-video checkpoint.",
        )
        if config.patch_size[0] != 1:
            raise BackboneError(
                f"The {name} has patch_size={tuple(config.patch_size)}; only patches of a single latent frame are "
                "supported, as in the published checkpoints."
            )

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """The flow with the scheduler's `flow_shift` (3 for 480p, 5 for 720p); the transformer gets sigma * 1000.

        UniPC rounds the timesteps of inference down to integers; training gives the sigma's own, less than 1 higher.
        """
        scheduler = self.pipeline.scheduler
        return flow_noise_schedule(scheduler, timestep_scale=float(scheduler.config.num_train_timesteps))

    @cached_property
    def _patch_size(self) -> tuple[int, int, int]:
        return tuple(getattr(self.pipeline, self._transformer_names[0]).config.patch_size)

    @property
    def spatial_multiple(self) -> int:
        """16 for Wan 2.1 and A14B, 32 for TI2V-5B: pixels per latent, times the side of a patch."""
        return self.pipeline.vae.config.scale_factor_spatial * max(self._patch_size[1:])

    @property
    def frame_multiple(self) -> int:
        """4: the VAE encodes the first frame alone, then four at a time, and would silently drop the rest."""
        return self.pipeline.vae.config.scale_factor_temporal

    @property
    def default_size(self) -> tuple[int, int]:
        """480 x 832."""
        return call_default(self.pipeline, "height"), call_default(self.pipeline, "width")

    @cached_property
    def _max_prompt_tokens(self) -> int:
        """512 as in the pipeline's `__call__`; `encode_prompt` alone would take 226, and the length matters."""
        return call_default(self.pipeline, "max_sequence_length")

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """`prompt_embeds` (tokens, dim) per prompt, without the zeros by which the pipeline pads to 512 tokens."""
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder:
            embeds, _ = self.pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_prompt_tokens,
                device=text_encoder.device,
            )
        return [{"prompt_embeds": embed[: _length_before_zeros(embed)].clone()} for embed in embeds]

    def collate(self, conditioning: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """`prompt_embeds` (B, 512, dim), padded with zeros; the transformer attends to them as in inference."""
        embeds = [item["prompt_embeds"] for item in conditioning]
        return {"prompt_embeds": torch.stack([F.pad(e, (0, 0, 0, self._max_prompt_tokens - len(e))) for e in embeds])}

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, (num_frames - 1) / 4 + 1, height / 8, width / 8); for TI2V-5B 48 channels and 16 pixels a side."""
        self.validate_size(height, width, num_frames)
        vae = self.pipeline.vae.config
        latent_frames = (num_frames - 1) // vae.scale_factor_temporal + 1
        return vae.z_dim, latent_frames, height // vae.scale_factor_spatial, width // vae.scale_factor_spatial

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """By channel, from the VAE's `latents_mean` and `latents_std`."""
        mean, std = channel_statistics(self.pipeline.vae, latents)
        return (latents - mean) / std

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of [`normalize_latents`]."""
        mean, std = channel_statistics(self.pipeline.vae, latents)
        return latents * std + mean

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, C, f, h, w); `conditioning["prompt_embeds"]` is (B, 512, dim). `extra` is not used."""
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        timestep = level.timestep.to(device, torch.float32)
        if self.pipeline.config.expand_timesteps:
            timestep = timestep[:, None].expand(-1, self._num_tokens(noisy_latents))
        return denoiser(
            hidden_states=noisy_latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            return_dict=False,
        )[0]

    def _num_tokens(self, latents: Tensor) -> int:
        _, patch_height, patch_width = self._patch_size
        frames, height, width = latents.shape[-3:]
        return frames * (height // patch_height) * (width // patch_width)


def _length_before_zeros(embeds: Tensor) -> int:
    """Rows (tokens, dim) up to the last that is not zero: those of the prompt, whose end token is never zero."""
    return int(embeds.any(dim=-1).nonzero().max()) + 1
