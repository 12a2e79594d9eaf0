# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo: any checkpoint whose pipeline class is `HunyuanVideoPipeline`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.flow_scheduler import check_static_shift, flow_noise_schedule
from trl_sipo.adapters.text_padding import pad_rows, trim_padding
from trl_sipo.adapters.transformer import check_channels
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel
from trl_sipo.errors import BackboneError


class HunyuanVideoAdapter(BackboneAdapter):
    """Adapter of `HunyuanVideoPipeline`: a guidance-distilled transformer, Llama with a mask and pooled CLIP, flow.

    `extra["guidance_scale"]` is the scale that the transformer is told, 6 where absent.
    """

    pipeline_class_name = "HunyuanVideoPipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    is_video = True
    frame_rate = 24.0
    lora_target_modules = (
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
    )
    input_layer_name = "x_embedder.proj"
    vae_slice_size = 1

    def check_configuration(self) -> None:
        """Refuse image-conditioned transformers, and schedulers of another process."""
        transformer, vae = self.pipeline.transformer.config, self.pipeline.vae.config
        if transformer.image_condition_type is not None:
            raise BackboneError(
                f"The transformer has image_condition_type={transformer.image_condition_type!r}: it continues a given "
                "image. Use a text-to-video checkpoint."
            )
        check_channels(
            "transformer",
            takes=transformer.in_channels,
            gives=transformer.out_channels,
            latents=vae.latent_channels,
            way_out="an image-conditioned model. Use a text-to-video checkpoint.",
        )
        check_static_shift(self.pipeline, "the scheduler's shift (7 for the published checkpoint)")
        _ = self.noise_schedule

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """The rectified flow with the scheduler's `shift`, 7 for the published checkpoint."""
        return flow_noise_schedule(self.pipeline.scheduler, timestep_scale=1000.0)

    @property
    def spatial_multiple(self) -> int:
        """16 for the published checkpoint: 2x2 latents of 8 pixels each."""
        return self.pipeline.transformer.config.patch_size * self.pipeline.vae_scale_factor_spatial

    @property
    def frame_multiple(self) -> int:
        """4 for the published checkpoint."""
        return self.pipeline.vae_scale_factor_temporal

    @property
    def default_size(self) -> tuple[int, int]:
        """720 x 1280."""
        return call_default(self.pipeline, "height"), call_default(self.pipeline, "width")

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Per prompt `prompt_embeds` (length, dim), their `prompt_embeds_mask`, and `pooled_prompt_embeds` (dim,).

        The pipeline wraps prompts in a template, whose tokens before the prompt it cuts off again.
        """
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder, self._frozen_inference("text_encoder_2"):
            embeds, pooled, mask = self.pipeline.encode_prompt(
                list(prompts), device=text_encoder.device, max_sequence_length=self._max_prompt_tokens
            )
        return [
            {"prompt_embeds": row, "prompt_embeds_mask": kept, "pooled_prompt_embeds": vector.clone()}
            for (row, kept), vector in zip(trim_padding(embeds, mask), pooled, strict=True)
        ]

    def collate(self, conditioning: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Llama's embeddings and their mask padded to the length of inference (256 tokens)."""
        batch = super().collate([{"pooled_prompt_embeds": item["pooled_prompt_embeds"]} for item in conditioning])
        for key in ("prompt_embeds", "prompt_embeds_mask"):
            batch[key] = pad_rows([item[key] for item in conditioning], self._max_prompt_tokens)
        return batch

    @property
    def _max_prompt_tokens(self) -> int:
        return call_default(self.pipeline, "max_sequence_length")

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, (frames - 1) / 4 + 1, height / 8, width / 8) for the published checkpoint."""
        self.validate_size(height, width, num_frames)
        ratio = self.pipeline.vae_scale_factor_spatial
        return (
            self.pipeline.vae.config.latent_channels,
            (num_frames - 1) // self.frame_multiple + 1,
            height // ratio,
            width // ratio,
        )

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Times the VAE's `scaling_factor` (0.476986 for the published checkpoint)."""
        return latents * self.pipeline.vae.config.scaling_factor

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Divided by the VAE's `scaling_factor`."""
        return latents / self.pipeline.vae.config.scaling_factor

    @property
    def embeds_guidance(self) -> bool:
        """True: the pipeline gives it to every checkpoint."""
        return True

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, C, f, h, w); `conditioning` as [`collate`] gives it.

        `extra["guidance_scale"]`: a number, 6 where absent.
        """
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        scale = (extra or {}).get("guidance_scale", call_default(self.pipeline, "guidance_scale"))
        # Multiplied in the denoiser's dtype, as the pipeline does, so that bfloat16 rounds it alike.
        guidance = torch.full((len(noisy_latents),), scale, dtype=dtype, device=device) * 1000.0
        return denoiser(
            hidden_states=noisy_latents.to(dtype),
            # In bfloat16 the pipeline gives the first timestep whole, and rounds the later ones with its latents.
            timestep=level.timestep.to(device, torch.float32),
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            encoder_attention_mask=conditioning["prompt_embeds_mask"].to(device, dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(device, dtype),
            guidance=guidance,
            return_dict=False,
        )[0]
