# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-1.5: any checkpoint whose pipeline class is `HunyuanVideo15Pipeline` (text to video)."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.flow_scheduler import check_static_shift, flow_noise_schedule
from trl_sipo.adapters.text_padding import pad_rows, trim_padding
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel
from trl_sipo.errors import BackboneError


class HunyuanVideo15Adapter(BackboneAdapter):
    """Adapter of `HunyuanVideo15Pipeline`: transformer for text and image, Qwen2.5-VL and ByT5 with masks, flow.

    The pipeline has no LoRA methods; a LoRA saved here is loaded into its transformer:
    `pipeline.transformer.load_lora_adapter(directory, use_safetensors=True)`.
    """

    pipeline_class_name = "HunyuanVideo15Pipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    is_video = True
    frame_rate = 24.0
    # The text stream has layers of its own (add_q_proj, ...), of which the last block's never reach the prediction:
    # LoRA in them would get no gradient, which distributed training refuses.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    lora_loading_code = ('pipe.transformer.load_lora_adapter("{path}", use_safetensors=True)',)
    input_layer_name = "x_embedder.proj"
    # The attention mask of this VAE has the wrong shape for more than one video.
    vae_slice_size = 1

    def check_configuration(self) -> None:
        """Refuse transformers that take or give other channels, and schedulers of another process."""
        transformer, channels = self.pipeline.transformer.config, self.pipeline.vae.config.latent_channels
        # Noisy latents, those of a given image, and a mask that says where there is one.
        for side, needed in (("in_channels", 2 * channels + 1), ("out_channels", channels)):
            if transformer[side] != needed:
                raise BackboneError(
                    f"The transformer has {side}={transformer[side]}, but the VAE's latents of {channels} channels "
                    f"need {needed}: another kind of model (super-resolution). Use a text-to-video checkpoint."
                )
        check_static_shift(self.pipeline, "the scheduler's shift (5 for 480p, 9 for 720p)")
        _ = self.noise_schedule

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """The rectified flow with the scheduler's `shift`, 5 (480p) or 9 (720p) for the published checkpoints."""
        return flow_noise_schedule(self.pipeline.scheduler, timestep_scale=1000.0)

    @property
    def spatial_multiple(self) -> int:
        """16 for the published checkpoints: the pixels of one latent, which is one patch."""
        return self.pipeline.transformer.config.patch_size * self.pipeline.vae_scale_factor_spatial

    @property
    def frame_multiple(self) -> int:
        """4 for the published checkpoints."""
        return self.pipeline.vae_scale_factor_temporal

    @property
    def default_size(self) -> tuple[int, int]:
        """The 16:9 format with about as many pixels as the square of the transformer's `target_size`."""
        pipeline = self.pipeline
        width, height = pipeline.default_aspect_ratio
        return pipeline.video_processor.calculate_default_height_width(height, width, pipeline.target_size)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Per prompt `prompt_embeds` (length, dim) of Qwen2.5-VL, `prompt_embeds_2` (length, dim) of ByT5, and masks.

        ByT5 reads what stands in quotation marks, the text to be drawn; without any, its length is 0.
        """
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder, self._frozen_inference("text_encoder_2"):
            embeds, mask, embeds_2, mask_2 = self.pipeline.encode_prompt(
                list(prompts), device=text_encoder.device, batch_size=len(prompts)
            )
        names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
        rows = zip(trim_padding(embeds, mask), trim_padding(embeds_2, mask_2), strict=True)
        return [dict(zip(names, (*text, *glyphs), strict=True)) for text, glyphs in rows]

    def collate(self, conditioning: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Padded to the lengths of inference (1000 tokens of Qwen2.5-VL, 256 of ByT5)."""
        length, length_2 = self.pipeline.tokenizer_max_length, self.pipeline.tokenizer_2_max_length
        return {
            key: pad_rows([item[key] for item in conditioning], length_2 if key.endswith("_2") else length)
            for key in conditioning[0]
        }

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(32, (frames - 1) / 4 + 1, height / 16, width / 16) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        ratio = self.pipeline.vae_scale_factor_spatial
        return (
            self.pipeline.vae.config.latent_channels,
            (num_frames - 1) // self.frame_multiple + 1,
            height // ratio,
            width // ratio,
        )

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Times the VAE's `scaling_factor` (1.03682 for the published checkpoints)."""
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
        """Prediction (B, C, f, h, w); `conditioning` as [`collate`] gives it. `extra` is not used.

        The transformer is told that there is no image: zeros in place of its latents, their mask and its embeddings.
        """
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        latents = noisy_latents.to(dtype)
        text = {key: value.to(device, dtype) for key, value in conditioning.items()}
        return denoiser(
            hidden_states=torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[:, :1])], dim=1),
            # In the denoiser's dtype, as the pipeline does: that of the time embedding's layers follows from it.
            timestep=level.timestep.to(device, dtype),
            encoder_hidden_states=text["prompt_embeds"],
            encoder_attention_mask=text["prompt_embeds_mask"],
            encoder_hidden_states_2=text["prompt_embeds_2"],
            encoder_attention_mask_2=text["prompt_embeds_mask_2"],
            image_embeds=latents.new_zeros(
                len(latents), self.pipeline.vision_num_semantic_tokens, self.pipeline.vision_states_dim
            ),
            return_dict=False,
        )[0]
