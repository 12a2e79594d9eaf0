# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: any checkpoint whose pipeline class is `StableDiffusion3Pipeline`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.flow_scheduler import flow_noise_schedule, linear_mu
from trl_sipo.adapters.transformer import check_channels, shift_and_scale, undo_shift_and_scale
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel
from trl_sipo.errors import BackboneError, ConfigurationError


class StableDiffusion3Adapter(BackboneAdapter):
    """Adapter of `StableDiffusion3Pipeline`: MMDiT denoiser, rectified flow, two CLIP text encoders and T5.

    T5 (`text_encoder_3` and `tokenizer_3`) may be left out to save memory; its tokens are then zeros, as in inference.
    """

    pipeline_class_name = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    optional_names = ("text_encoder_3", "tokenizer_3")
    # The joint attention of text and image; the second, image-only one of 3.5 Medium (`attn2`) is left as it is. The
    # last block drops its text tokens, so that its `add_q_proj` gets a gradient of zero: named all the same, since
    # this is the field's list.
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
        transformer = self.pipeline.transformer
        check_channels(
            "transformer",
            takes=transformer.config.in_channels,
            gives=transformer.out_channels,
            latents=self.pipeline.vae.config.latent_channels,
            way_out="an inpainting or image-conditioned model. Use a plain text-to-image checkpoint.",
        )
        if self.pipeline.text_encoder_3 is not None and self.pipeline.tokenizer_3 is None:
            raise BackboneError(
                "The StableDiffusion3Pipeline has a text_encoder_3 (T5) and no tokenizer_3. Load both, or neither "
                "(text_encoder_3=None, tokenizer_3=None)."
            )
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.noise_schedule

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """Rectified flow with the scheduler's shift (3 as published), at the default size."""
        return self.noise_schedule_for(*self.default_size)

    def noise_schedule_for(self, height: int, width: int, num_frames: int = 1, num_steps: int = 50) -> FlowSchedule:
        """Differs from [`noise_schedule`] for a scheduler with `use_dynamic_shifting`, which none published has.

        The sampler's steps are a little longer than this grid's: the pipeline leaves them to the scheduler, whose N
        steps before the shift are N - 1 of 0.997 / (N - 1) and a last one of 0.003, not N of 1 / N. They are 1.7 %
        longer for N = 50, and 4.9 % for 20.
        """
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
                # Without a mask, T5's length changes the prediction.
                max_sequence_length=call_default(self.pipeline, "max_sequence_length"),
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
        return shift_and_scale(self.pipeline.vae, latents)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of [`normalize_latents`]."""
        return undo_shift_and_scale(self.pipeline.vae, latents)

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
