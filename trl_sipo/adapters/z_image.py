# SPDX-License-Identifier: Apache-2.0
"""Z-Image and Z-Image-Turbo: any checkpoint whose pipeline class is `ZImagePipeline`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.flow_scheduler import flow_noise_schedule, linear_mu
from trl_sipo.adapters.text_padding import pad_rows
from trl_sipo.adapters.transformer import check_channels, shift_and_scale, undo_shift_and_scale
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel


class ZImageAdapter(BackboneAdapter):
    """Adapter of `ZImagePipeline`: single-stream transformer, Qwen3 text encoder, rectified flow.

    The transformer's time runs from noise 0 to 1, and it predicts the negative of the flow: both are turned around
    in [`forward`], so that outside of it Z-Image is a flow model like the others.
    """

    pipeline_class_name = "ZImagePipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    input_layer_name = "all_x_embedder.2-1"

    def check_configuration(self) -> None:
        """Refuse transformers of other channels than the VAE's, and schedulers of another process."""
        channels = self.pipeline.transformer.config.in_channels
        check_channels(
            "transformer",
            takes=channels,
            gives=channels,
            latents=self.pipeline.vae.config.latent_channels,
            way_out="an image-conditioned model, or another model's VAE. Use a plain text-to-image checkpoint.",
        )
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.noise_schedule

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """That of the default size."""
        return self.noise_schedule_for(*self.default_size)

    def noise_schedule_for(self, height: int, width: int, num_frames: int = 1, num_steps: int = 50) -> FlowSchedule:
        """The scheduler's process; its shift depends on the size only with `use_dynamic_shifting`.

        Timesteps are the sigmas.
        """
        _, rows, columns = self.latent_shape(height, width, num_frames)
        mu = linear_mu(self.pipeline.scheduler, (rows // 2) * (columns // 2))
        return flow_noise_schedule(self.pipeline.scheduler, timestep_scale=1.0, mu=mu)

    @property
    def spatial_multiple(self) -> int:
        """16 for the published checkpoints: 2x2 latents of 8 pixels each."""
        return 2 * self.pipeline.vae_scale_factor

    @property
    def default_size(self) -> tuple[int, int]:
        """1024 x 1024, whatever the configuration."""
        return 1024, 1024

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Per prompt `prompt_embeds` (length, dim) and `prompt_embeds_mask` (length,), bool, without padding."""
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder:
            rows, _ = self.pipeline.encode_prompt(
                list(prompts),  # a copy: the pipeline writes the prompts in their chat template into the list
                text_encoder.device,
                do_classifier_free_guidance=False,
                max_sequence_length=call_default(self.pipeline, "max_sequence_length"),
            )
        return [{"prompt_embeds": row, "prompt_embeds_mask": row.new_ones(len(row), dtype=torch.bool)} for row in rows]

    def collate(self, conditioning: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Padded to the longest prompt of the batch; [`forward`] gives each prompt to the denoiser without padding."""
        longest = max(len(item["prompt_embeds"]) for item in conditioning)
        return {key: pad_rows([item[key] for item in conditioning], longest) for key in conditioning[0]}

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, height / 8, width / 8) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.latent_channels, height // factor, width // factor

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Less the VAE's `shift_factor`, times its `scaling_factor`."""
        return shift_and_scale(self.pipeline.vae, latents)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of [`normalize_latents`]."""
        return undo_shift_and_scale(self.pipeline.vae, latents)

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, 16, h, w); `conditioning` has `prompt_embeds` and `prompt_embeds_mask`. `extra` is not used.

        The denoiser takes and gives lists, of latents (16, 1, h, w) and of prompts (tokens, dim) without padding.
        """
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        embeds = conditioning["prompt_embeds"].to(device, dtype)
        lengths = conditioning["prompt_embeds_mask"].sum(dim=1).tolist()
        timestep = (1000 - 1000 * level.timestep.to(device)) / 1000  # 1 - sigma, rounded as in the pipeline
        outputs = denoiser(
            list(noisy_latents.to(dtype).unsqueeze(2).unbind()),
            timestep,
            [row[:length] for row, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(outputs).squeeze(2)
