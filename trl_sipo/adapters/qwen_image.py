# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image: any checkpoint whose pipeline class is `QwenImagePipeline`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.flow_scheduler import flow_noise_schedule, linear_mu
from trl_sipo.adapters.text_padding import pad_rows, trim_padding
from trl_sipo.adapters.transformer import channel_statistics, check_channels
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel
from trl_sipo.errors import BackboneError

# Options of the transformer by which it takes inputs that this pipeline cannot give either.
_EXTRA_INPUT_OPTIONS = {
    "guidance_embeds": "an embedded guidance scale, which the transformer of diffusers declares and cannot compute",
    "use_additional_t_cond": "a second time conditioning (Qwen-Image-Layered)",
}


class QwenImageAdapter(BackboneAdapter):
    """Adapter of `QwenImagePipeline`: transformer on packed latents, Qwen2.5-VL text encoder, rectified flow.

    Its VAE is that of a video model and sees one frame, which the latents, (B, 16, h, w), have no dimension for.
    """

    pipeline_class_name = "QwenImagePipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder")
    # The text stream has layers of its own (add_q_proj, ...), of which the last block's never reach the prediction:
    # LoRA in them would get no gradient, which distributed training refuses.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    # The pipeline guides only when it is given a negative prompt, and has none of its own: its documentation and the
    # model's authors give it one space.
    guidance_argument = "true_cfg_scale"
    sampling_options: ClassVar[Mapping[str, Any]] = {"negative_prompt": " "}
    input_layer_name = "img_in"

    def check_configuration(self) -> None:
        """Refuse transformers that need further inputs, other channels, and schedulers of another process."""
        transformer, vae = self.pipeline.transformer.config, self.pipeline.vae.config
        for option, meaning in _EXTRA_INPUT_OPTIONS.items():
            if transformer.get(option):
                raise BackboneError(
                    f"The transformer has {option}={transformer[option]!r}, that is {meaning}. Use a plain "
                    "text-to-image checkpoint."
                )
        given = transformer.patch_size**2 * (transformer.out_channels or transformer.in_channels)
        check_channels(
            "transformer",
            takes=transformer.in_channels,
            gives=given,
            latents=vae.z_dim,
            patch=2,
            way_out="an image-conditioned model, or another model's VAE. Use a plain text-to-image checkpoint.",
        )
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.noise_schedule

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """That of the default size: the published shift depends on the size."""
        return self.noise_schedule_for(*self.default_size)

    def noise_schedule_for(self, height: int, width: int, num_frames: int = 1, num_steps: int = 50) -> FlowSchedule:
        """The scheduler's process with its shift at the number of 2x2 latent patches; timesteps are the sigmas."""
        _, rows, columns = self.latent_shape(height, width, num_frames)
        mu = linear_mu(self.pipeline.scheduler, (rows // 2) * (columns // 2))
        return flow_noise_schedule(self.pipeline.scheduler, timestep_scale=1.0, mu=mu)

    @property
    def spatial_multiple(self) -> int:
        """16 for the published checkpoints: 2x2 latents of 8 pixels each."""
        return 2 * self.pipeline.vae_scale_factor

    @property
    def default_size(self) -> tuple[int, int]:
        """1024 x 1024."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Per prompt `prompt_embeds` (length, dim) and `prompt_embeds_mask` (length,), bool, without padding."""
        if not prompts:
            return []
        # That of `encode_prompt` itself has another default.
        max_length = call_default(self.pipeline, "max_sequence_length")
        with self._frozen_inference("text_encoder") as text_encoder:
            embeds, mask = self.pipeline.encode_prompt(
                list(prompts), text_encoder.device, max_sequence_length=max_length
            )
        if mask is None:  # no prompt was padded
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
        return [{"prompt_embeds": row, "prompt_embeds_mask": kept} for row, kept in trim_padding(embeds, mask)]

    def collate(self, conditioning: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Padded to the longest prompt of the batch, as in inference."""
        longest = max(len(item["prompt_embeds"]) for item in conditioning)
        return {key: pad_rows([item[key] for item in conditioning], longest) for key in conditioning[0]}

    def null_conditioning(self) -> Conditioning:
        """The prompt `" "`, the negative prompt of sampling."""
        return self.encode_prompts([self.sampling_options["negative_prompt"]])[0]

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, height / 8, width / 8) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.z_dim, height // factor, width // factor

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Standardised per channel, by `latents_mean` and `latents_std` of the VAE's configuration."""
        mean, std = channel_statistics(self.pipeline.vae, latents)
        return (latents - mean) / std

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of [`normalize_latents`]."""
        mean, std = channel_statistics(self.pipeline.vae, latents)
        return latents * std + mean

    def _vae_encode(self, vae: Any, pixels: Tensor) -> DiagonalGaussianDistribution:
        posterior = vae.encode(pixels.unsqueeze(2)).latent_dist
        return DiagonalGaussianDistribution(posterior.parameters.squeeze(2))

    def _vae_decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, 16, h, w); `conditioning` has `prompt_embeds` and `prompt_embeds_mask`. `extra` is not used.

        The published transformers embed no guidance scale.
        """
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        batch, channels, height, width = noisy_latents.shape
        mask = conditioning["prompt_embeds_mask"]
        packed = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents.to(dtype), batch, channels, height, width),
            # Rounded where the pipeline rounds, which in half precision is not the same as rounding sigma.
            timestep=(1000 * level.timestep.to(device)).to(dtype) / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            encoder_hidden_states_mask=None if mask.all() else mask.to(device, torch.int64),
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            attention_kwargs={},
            return_dict=False,
        )[0]
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(packed, height * factor, width * factor, factor).squeeze(2)
