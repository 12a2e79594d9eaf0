# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x: any checkpoint whose pipeline class is `StableDiffusionPipeline`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.unet import check_text_to_image_unet, default_unet_size
from trl_sipo.adapters.vp_scheduler import vp_noise_schedule, vp_prediction_type
from trl_sipo.core.noise_schedule import NoiseLevel, VPSchedule


class StableDiffusionAdapter(BackboneAdapter):
    """Adapter of `StableDiffusionPipeline`: U-Net denoiser, one CLIP text encoder, epsilon or v-prediction."""

    pipeline_class_name = "StableDiffusionPipeline"
    denoiser_name = "unet"
    frozen_names = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    input_layer_name = "conv_in"

    def check_configuration(self) -> None:
        """Refuse UNets that need further inputs, other output channels, and schedulers of another process."""
        check_text_to_image_unet(self.pipeline, addition_embed_type=None)
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.prediction_type, self.noise_schedule

    @property
    def prediction_type(self) -> str:
        """`"epsilon"` or `"v_prediction"`."""
        return vp_prediction_type(self.pipeline.scheduler)

    @cached_property
    def noise_schedule(self) -> VPSchedule:
        """The process of DDPM training with the betas of the scheduler's configuration."""
        return vp_noise_schedule(self.pipeline.scheduler)

    @property
    def spatial_multiple(self) -> int:
        """Pixels per latent, 8 for the published checkpoints; the U-Net itself takes odd latent sizes."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """512 x 512 for Stable Diffusion 1.5: the UNet's `sample_size` in pixels."""
        return default_unet_size(self.pipeline)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """`prompt_embeds` (tokens, dim) per prompt, padded to the tokenizer's length as in inference."""
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder:
            embeds = self.pipeline.encode_prompt(list(prompts), text_encoder.device, 1, False)[0]
        # Cloned: a row of the batch would keep all of it in memory, and in a cache on disk.
        return [{"prompt_embeds": embed.clone()} for embed in embeds]

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(4, height / 8, width / 8) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        return (
            self.pipeline.vae.config.latent_channels,
            height // self.spatial_multiple,
            width // self.spatial_multiple,
        )

    def sample_batch(self, prompts: Sequence[str], height: int, width: int, **options: Any) -> Tensor:
        """As the base class, without the pipeline's safety checker, which puts black images in the place of some."""
        # Not by assignment: the pipeline would note that it has no checker, and no longer save it.
        components = vars(self.pipeline)
        checker, components["safety_checker"] = components["safety_checker"], None
        try:
            return super().sample_batch(prompts, height, width, **options)
        finally:
            components["safety_checker"] = checker

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Times the VAE's `scaling_factor` (0.18215 for the published checkpoints)."""
        return latents * self.pipeline.vae.config.scaling_factor

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Divided by the VAE's `scaling_factor`."""
        return latents / self.pipeline.vae.config.scaling_factor

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, C, h, w); `conditioning["prompt_embeds"]` is (B, tokens, dim). `extra` is not used."""
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        return denoiser(
            noisy_latents.to(dtype),
            level.timestep.to(device, torch.int64),
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            return_dict=False,
        )[0]
