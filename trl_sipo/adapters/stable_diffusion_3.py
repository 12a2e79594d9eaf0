# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: any checkpoint whose pipeline class is `StableDiffusion3Pipeline`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.flow_scheduler import flow_noise_schedule, linear_mu
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel
from trl_sipo.errors import BackboneError, ConfigurationError

_MAX_SEQUENCE_LENGTH = 256
"""Tokens of T5, as in `StableDiffusion3Pipeline.__call__`; without a mask, the length changes the prediction."""


class StableDiffusion3Adapter(BackboneAdapter):
    """Adapter of `StableDiffusion3Pipeline`: MMDiT denoiser, rectified flow, two CLIP text encoders and T5.

    T5 (`text_encoder_3` and `tokenizer_3`) may be left out to save memory; its tokens are then zeros, as in inference.
    """

    pipeline_class_name = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    frozen_names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    optional_names = ("text_encoder_3", "tokenizer_3")
    # The joint attention of text and image; the second, image-only one of 3.5 Medium (`attn2`) is left as it is.
    lora_target_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    input_layer_name = "pos_embed.proj"

    def check_configuration(self) -> None:
        """Refuse a transformer of other channels than the VAE's, T5 without its tokenizer, and other schedulers."""
        transformer, vae = self.pipeline.transformer.config, self.pipeline.vae.config
        for side, channels in (("takes", transformer.in_channels), ("gives", self.pipeline.transformer.out_channels)):
            if channels != vae.latent_channels:
                raise BackboneError(
                    f"The transformer {side} {channels} channels but the VAE's latents have {vae.latent_channels}: an "
                    "inpainting or image-conditioned model. Use a plain text-to-image checkpoint."
                )
        if self.pipeline.text_encoder_3 is not None and self.pipeline.tokenizer_3 is None:
            raise BackboneError(
                "The StableDiffusion3Pipeline has a text_encoder_3 (T5) and no tokenizer_3. Load both, or neither "
                "(text_encoder_3=None, tokenizer_3=None)."
            )
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.noise_schedule

    @property
    def prediction_type(self) -> str:
        """`"flow_prediction"`."""
        return "flow_prediction"

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """Rectified flow with the scheduler's shift (3 as published), at the default size."""
        return self.noise_schedule_for(*self.default_size)

    def noise_schedule_for(self, height: int, width: int, num_frames: int = 1, num_steps: int = 50) -> FlowSchedule:
        """Differs from [`noise_schedule`] for a scheduler with `use_dynamic_shifting`, which none published has."""
        patch = self.pipeline.transformer.config.patch_size
        _, latent_height, latent_width = self.latent_shape(height, width, num_frames)
        sequence_length = (latent_height // patch) * (latent_width // patch)
        scheduler = self.pipeline.scheduler
        return flow_noise_schedule(scheduler, timestep_scale=1000.0, mu=linear_mu(scheduler, sequence_length))

    @property
    def spatial_multiple(self) -> int:
        """Pixels per patch, 16 for the published checkpoints: an odd latent size would be cropped in silence."""
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    @property
    def default_size(self) -> tuple[int, int]:
        """1024 x 1024 for the published checkpoints: the transformer's `sample_size` in pixels."""
        side = self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor
        return side, side

    def validate_size(self, height: int, width: int, num_frames: int = 1) -> None:
        """As the base class, and no side beyond the transformer's table of positions (3072 pixels for SD3 Medium)."""
        super().validate_size(height, width, num_frames)
        positions = self.pipeline.transformer.config.pos_embed_max_size
        for name, size in (("height", height), ("width", width)):
            if size > (largest := positions * self.spatial_multiple):
                raise ConfigurationError(
                    f"{name} {size} has more patches than the transformer has positions "
                    f"(pos_embed_max_size={positions}). Largest valid: {largest}."
                )

    # Prompts

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """`prompt_embeds` (CLIP's tokens, then 256 of T5, dim) and `pooled_prompt_embeds` (pooled dim) per prompt."""
        if not prompts:
            return []
        with ExitStack() as stack:
            for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
                if getattr(self.pipeline, name) is not None:
                    stack.enter_context(self._frozen_inference(name))
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                list(prompts),
                prompt_2=None,
                prompt_3=None,
                device=self.pipeline.text_encoder.device,
                do_classifier_free_guidance=False,
                max_sequence_length=_MAX_SEQUENCE_LENGTH,
            )
        # Cloned: a row of the batch would keep all of it in memory, and in a cache on disk.
        return [
            {"prompt_embeds": embed.clone(), "pooled_prompt_embeds": vector.clone()}
            for embed, vector in zip(embeds, pooled, strict=True)
        ]

    # Media

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, height / 8, width / 8) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.latent_channels, height // factor, width // factor

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Less the VAE's `shift_factor` (0.0609), times its `scaling_factor` (1.5305)."""
        config = self.pipeline.vae.config
        return (latents - config.shift_factor) * config.scaling_factor

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of [`normalize_latents`]."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor

    # Denoiser

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, C, h, w); `conditioning` as [`encode_prompts`] gives it, batched. `extra` is not used."""
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        return denoiser(
            hidden_states=noisy_latents.to(dtype),
            timestep=level.timestep.to(device, torch.float32),
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(device, dtype),
            return_dict=False,
        )[0]
