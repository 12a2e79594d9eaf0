# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL, SDXL-Turbo and their fine-tunes: any checkpoint whose class is `StableDiffusionXLPipeline`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.unet import check_text_to_image_unet, default_unet_size
from trl_sipo.adapters.vp_scheduler import vp_noise_schedule, vp_prediction_type
from trl_sipo.core.noise_schedule import NoiseLevel, VPSchedule
from trl_sipo.core.transfer import to_device
from trl_sipo.errors import BackboneError

_TIME_IDS = 6
"""Original height and width, top and left of the crop, target height and width."""


class StableDiffusionXLAdapter(BackboneAdapter):
    """Adapter of `StableDiffusionXLPipeline`: U-Net denoiser, two CLIP text encoders, epsilon or v-prediction.

    The U-Net is told the size that it draws and no crop, as inference tells it by default.
    """

    pipeline_class_name = "StableDiffusionXLPipeline"
    denoiser_name = "unet"
    frozen_names = ("vae", "text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    input_layer_name = "conv_in"

    def __init__(self, pipeline: DiffusionPipeline):
        has_encoders = [getattr(pipeline, name, None) is not None for name in ("text_encoder", "text_encoder_2")]
        if type(pipeline).__name__ == self.pipeline_class_name and has_encoders == [False, True]:
            raise BackboneError(
                "The StableDiffusionXLPipeline has no text_encoder, only text_encoder_2: SDXL's refiner, which "
                "polishes images and does not draw them, or a pipeline loaded in part. Load the whole base model."
            )
        super().__init__(pipeline)

    def check_configuration(self) -> None:
        """Refuse U-Nets that need further inputs, such as the refiner's, and schedulers of another process."""
        check_text_to_image_unet(self.pipeline, addition_embed_type="text_time")
        unet, pooled_dim = self.pipeline.unet.config, self.pipeline.text_encoder_2.config.projection_dim
        added_dim = unet.projection_class_embeddings_input_dim
        if added_dim != _TIME_IDS * unet.addition_time_embed_dim + pooled_dim:
            raise BackboneError(
                f"The UNet has projection_class_embeddings_input_dim={added_dim}, not the {_TIME_IDS} sizes and crops "
                f"of {unet.addition_time_embed_dim} dimensions and the pooled prompt of {pooled_dim} that inference "
                "feeds: SDXL's refiner (which takes an aesthetic score), or text encoders of another model. Use "
                "the base model."
            )
        if self.pipeline.config.get("requires_aesthetics_score"):
            raise BackboneError(
                "The pipeline has requires_aesthetics_score=True: the UNet of SDXL's refiner takes a score, which "
                "this adapter does not feed. Use the base model."
            )
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
        return self.pipeline.vae_scale_factor

    @property
    def default_size(self) -> tuple[int, int]:
        """1024 x 1024 for the base model, 512 x 512 for Turbo: the UNet's `sample_size` in pixels."""
        return default_unet_size(self.pipeline)

    # Prompts

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """`prompt_embeds` (tokens, dim) of both text encoders, `pooled_prompt_embeds` (pooled dim) of the second."""
        if not prompts:
            return []
        embeds, _, pooled, _ = self._encode(list(prompts), with_negative=False)
        # Cloned: a row of the batch would keep all of it in memory, and in a cache on disk.
        return [
            {"prompt_embeds": embed.clone(), "pooled_prompt_embeds": vector.clone()}
            for embed, vector in zip(embeds, pooled, strict=True)
        ]

    def null_conditioning(self) -> Conditioning:
        """Zeros for a pipeline with `force_zeros_for_empty_prompt` (the published base), else the empty prompt's."""
        _, embeds, _, pooled = self._encode([""], with_negative=True)
        return {"prompt_embeds": embeds[0], "pooled_prompt_embeds": pooled[0]}

    def _encode(self, prompts: list[str], *, with_negative: bool) -> tuple[Tensor, ...]:
        """Embeddings of the prompts, of no negative prompt, and the pooled ones of both."""
        with self._frozen_inference("text_encoder") as text_encoder, self._frozen_inference("text_encoder_2"):
            return self.pipeline.encode_prompt(
                prompts, device=text_encoder.device, do_classifier_free_guidance=with_negative
            )

    # Media

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(4, height / 8, width / 8) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        multiple = self.spatial_multiple
        return self.pipeline.vae.config.latent_channels, height // multiple, width // multiple

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Times the VAE's `scaling_factor` (0.13025), after the mean and deviation per channel that some VAEs have."""
        mean, std = self._channel_statistics(latents)
        return (latents - mean) / std * self.pipeline.vae.config.scaling_factor

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of [`normalize_latents`]."""
        mean, std = self._channel_statistics(latents)
        return latents * std / self.pipeline.vae.config.scaling_factor + mean

    def _channel_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (C, 1, 1); 0 and 1 for VAEs that do not state both."""
        mean, std = self.pipeline.vae.config.get("latents_mean"), self.pipeline.vae.config.get("latents_std")
        if mean is None or std is None:
            mean, std = [0.0], [1.0]
        mean, std = to_device(torch.tensor([mean, std], dtype=latents.dtype), latents.device)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    @contextmanager
    def _frozen_inference(self, name: str) -> Iterator[Any]:
        """As the base class, but a float16 VAE that overflows in it (`force_upcast`) runs in float32.

        It is put back after each call, without loss, since the pipeline upcasts only a VAE that it finds in float16.
        """
        with super()._frozen_inference(name) as module:
            if name != "vae" or module.dtype != torch.float16 or not module.config.force_upcast:
                yield module
                return
            module.float()  # not .to(dtype), which logs a warning each time
            try:
                yield module
            finally:
                module.half()

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
            noisy_latents.to(dtype),
            level.timestep.to(device, torch.int64),
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"].to(device, dtype),
                "time_ids": self._time_ids(noisy_latents),
            },
            return_dict=False,
        )[0]

    def _time_ids(self, latents: Tensor) -> Tensor:
        """(B, 6), the whole of an image of the size drawn; float32, since bfloat16 would round 2056 to 2048."""
        batch, _, *latent_size = latents.shape
        height, width = (side * self.spatial_multiple for side in latent_size)
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        return to_device(sizes, latents.device).expand(batch, _TIME_IDS)
