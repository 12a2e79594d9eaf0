# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 (dev and schnell): any checkpoint whose pipeline class is `FluxPipeline`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.flow_scheduler import flow_noise_schedule, linear_mu
from trl_sipo.adapters.transformer import check_channels, shift_and_scale, undo_shift_and_scale
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel
from trl_sipo.core.transfer import to_device


class FluxAdapter(BackboneAdapter):
    """Adapter of `FluxPipeline`: transformer over 2x2 patches, CLIP (pooled) and T5 text encoders, rectified flow.

    The patches exist inside [`forward`] alone. FLUX.1-dev is distilled to take a guidance scale as an input, which
    `extra["guidance_scale"]` gives; FLUX.1-schnell takes none.
    """

    pipeline_class_name = "FluxPipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    lora_target_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    input_layer_name = "x_embedder"

    def check_configuration(self) -> None:
        """Refuse transformers that take more than the noisy latents (Fill, Canny, Depth, ...)."""
        transformer = self.pipeline.transformer.config
        check_channels(
            "transformer",
            takes=transformer.in_channels,
            gives=transformer.out_channels or transformer.in_channels,
            latents=self.pipeline.vae.config.latent_channels,
            patch=2,
            way_out="an inpainting or control model. Use a plain text-to-image checkpoint.",
        )
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.noise_schedule

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """The flow at the default size, with sigma itself for the timestep."""
        return self.noise_schedule_for(*self.default_size)

    def noise_schedule_for(self, height: int, width: int, num_frames: int = 1, num_steps: int = 50) -> FlowSchedule:
        """With dynamic shifting (FLUX.1-dev), larger images are shifted further towards noise."""
        _, rows, columns = self.latent_shape(height, width, num_frames)
        scheduler = self.pipeline.scheduler
        return flow_noise_schedule(scheduler, timestep_scale=1.0, mu=linear_mu(scheduler, rows * columns // 4))

    @property
    def spatial_multiple(self) -> int:
        """16 for the published checkpoints: 8 pixels per latent, 2 latents per patch."""
        return 2 * self.pipeline.vae_scale_factor

    @property
    def default_size(self) -> tuple[int, int]:
        """1024 x 1024 for the published checkpoints."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Per prompt `prompt_embeds` (512, dim) of T5, whose padding the transformer attends, and CLIP's `pooled`."""
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder, self._frozen_inference("text_encoder_2"):
            embeds, pooled, _ = self.pipeline.encode_prompt(
                list(prompts),
                device=text_encoder.device,
                max_sequence_length=call_default(self.pipeline, "max_sequence_length"),
            )
        # Cloned: a row of the batch would keep all of it in memory, and in a cache on disk.
        return [
            {"prompt_embeds": row.clone(), "pooled_prompt_embeds": pooled_row.clone()}
            for row, pooled_row in zip(embeds, pooled, strict=True)
        ]

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, height / 8, width / 8) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        pixels = self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.latent_channels, height // pixels, width // pixels

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Minus the VAE's `shift_factor`, times its `scaling_factor`."""
        return shift_and_scale(self.pipeline.vae, latents)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Divided by the VAE's `scaling_factor`, plus its `shift_factor`."""
        return undo_shift_and_scale(self.pipeline.vae, latents)

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, C, h, w), of the patches (B, h / 2 * w / 2, 4 * C) that the transformer takes and gives."""
        pipeline, dtype, device = self.pipeline, self.input_dtype(denoiser), noisy_latents.device
        batch, channels, height, width = noisy_latents.shape
        prompt_embeds = conditioning["prompt_embeds"].to(device, dtype)
        image_ids = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", dtype)
        prediction = denoiser(
            hidden_states=pipeline._pack_latents(noisy_latents.to(dtype), batch, channels, height, width),
            # Rounded as the pipeline rounds it: sigma * 1000 to the transformer's dtype, and divided there.
            timestep=(level.timestep.to(device) * 1000).to(dtype) / 1000,
            guidance=self._guidance(batch, device, extra),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(device, dtype),
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, dtype=dtype, device=device),
            img_ids=to_device(image_ids, device),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
        pixels = pipeline.vae_scale_factor
        return pipeline._unpack_latents(prediction, height * pixels, width * pixels, pixels)

    @property
    def embeds_guidance(self) -> bool:
        """True for FLUX.1-dev, False for schnell."""
        return self.pipeline.transformer.config.guidance_embeds

    def _guidance(self, batch: int, device: torch.device, extra: Mapping[str, Any] | None) -> Tensor | None:
        """(B,) float32 for a guidance-distilled transformer, which embeds it; None for others."""
        if not self.embeds_guidance:
            return None
        scale = (extra or {}).get("guidance_scale", call_default(self.pipeline, "guidance_scale"))
        return torch.full((batch,), scale, dtype=torch.float32, device=device)
