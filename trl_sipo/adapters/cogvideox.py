# SPDX-License-Identifier: Apache-2.0
"""CogVideoX 2B, 5B and 1.5-5B: any text-to-video checkpoint whose pipeline class is `CogVideoXPipeline`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.transformer import check_channels
from trl_sipo.adapters.vp_scheduler import vp_noise_schedule, vp_prediction_type
from trl_sipo.core.noise_schedule import NoiseLevel, VPSchedule
from trl_sipo.errors import BackboneError


class CogVideoXAdapter(BackboneAdapter):
    """Adapter of `CogVideoXPipeline`: v-prediction with zero terminal SNR, a T5 text encoder, a causal video VAE.

    Images are single frames. Of 1.5, the latents begin with a copy of their first frame, since its patches take two
    latent frames; decoding drops it.
    """

    pipeline_class_name = "CogVideoXPipeline"
    denoiser_name = "transformer"
    frozen_names = ("vae", "text_encoder")
    is_video = True
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    input_layer_name = "patch_embed.proj"
    frame_rate = 8.0
    vae_slice_size = 1

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        if self._pads_latent_frames:
            self.frame_rate = 16.0  # of 1.5

    def check_configuration(self) -> None:
        """Refuse transformers that need an image, and schedulers of another process."""
        config = self.pipeline.transformer.config
        check_channels(
            "transformer",
            takes=config.in_channels,
            gives=config.out_channels,
            latents=self.pipeline.vae.config.latent_channels,
            way_out="an image-to-video or control model. Use a text-to-video checkpoint.",
        )
        if config.ofs_embed_dim:
            raise BackboneError(
                f"The transformer has ofs_embed_dim={config.ofs_embed_dim}, an input that CogVideoXPipeline does not "
                "give: an image-to-video model. Use a text-to-video checkpoint."
            )
        if config.patch_size_t not in (None, 2):
            raise BackboneError(f"patch_size_t={config.patch_size_t}; known are None (1.0) and 2 (1.5).")
        if not config.use_rotary_positional_embeddings and config.max_text_seq_length != self._max_prompt_tokens:
            raise BackboneError(
                f"The transformer takes prompts of exactly {config.max_text_seq_length} tokens, but CogVideoXPipeline "
                f"encodes them to {self._max_prompt_tokens} by default."
            )
        scheduler = self.pipeline.scheduler
        if "snr_shift_scale" not in scheduler.config:
            raise BackboneError(
                f"The {type(scheduler).__name__} has no snr_shift_scale, which is part of the noise that CogVideoX is "
                "trained with. Give the pipeline a CogVideoXDDIMScheduler or CogVideoXDPMScheduler, from the "
                "scheduler's folder of the checkpoint."
            )
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.prediction_type, self.noise_schedule

    @property
    def prediction_type(self) -> str:
        """`"v_prediction"` for the published checkpoints."""
        return vp_prediction_type(self.pipeline.scheduler)

    @cached_property
    def noise_schedule(self) -> VPSchedule:
        """The process of the scheduler's configuration, its `snr_shift_scale` included; the last SNR is zero."""
        return vp_noise_schedule(self.pipeline.scheduler)

    @property
    def spatial_multiple(self) -> int:
        """16: 8 pixels per latent, 2 latents per patch. The pipeline asks for 8, and crops an odd latent size."""
        return self._pixels_per_latent * self.pipeline.transformer.config.patch_size

    @property
    def frame_multiple(self) -> int:
        """8: the VAE decodes two latent frames to 8 frames, and 9 at the start only of an odd number of them.

        Other counts decode to more frames than were encoded: 5 to 8, 13 to 16.
        """
        return self.pipeline.vae.num_latent_frames_batch_size * self._frames_per_latent

    @property
    def default_size(self) -> tuple[int, int]:
        """480 x 720 for 2B and 5B: the transformer's sample size in pixels.

        Of 1.5 this is 2400 x 2400, as in the pipeline's `__call__`, far beyond what it is made for (768 x 1360): it
        needs a size of the user's own.
        """
        config = self.pipeline.transformer.config
        return config.sample_height * self._pixels_per_latent, config.sample_width * self._pixels_per_latent

    @property
    def default_num_frames(self) -> int:
        """49 for 2B and 5B, 81 for 1.5: the transformer's `sample_frames`."""
        return self.pipeline.transformer.config.sample_frames

    @property
    def _pixels_per_latent(self) -> int:
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def _frames_per_latent(self) -> int:
        return int(self.pipeline.vae.config.temporal_compression_ratio)

    @property
    def _pads_latent_frames(self) -> bool:
        """Whether a patch takes two latent frames, of which valid media have an odd number."""
        return self.pipeline.transformer.config.patch_size_t is not None

    @property
    def _max_prompt_tokens(self) -> int:
        """226, as in the pipeline's `__call__`; the length changes the prediction."""
        return call_default(self.pipeline, "max_sequence_length")

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """`prompt_embeds` (226, dim) per prompt, padded as in inference: the transformer attends to the padding."""
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder:
            embeds, _ = self.pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_prompt_tokens,
                device=text_encoder.device,
            )
        return [{"prompt_embeds": embed.clone()} for embed in embeds]

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, (num_frames - 1) / 4 + 1, height / 8, width / 8); one frame more for 1.5."""
        self.validate_size(height, width, num_frames)
        latent_frames = (num_frames - 1) // self._frames_per_latent + 1 + self._pads_latent_frames
        channels = self.pipeline.vae.config.latent_channels
        return channels, latent_frames, height // self._pixels_per_latent, width // self._pixels_per_latent

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Times the VAE's `scaling_factor`, also where its `invert_scale_latents` is set: the pipeline divides."""
        return latents * self.pipeline.vae.config.scaling_factor

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Divided by the VAE's `scaling_factor`."""
        return latents / self.pipeline.vae.config.scaling_factor

    def _vae_encode(self, vae: Any, pixels: Tensor) -> Any:
        posterior = super()._vae_encode(vae, pixels)
        if self._pads_latent_frames:
            posterior.mean = _repeat_first_frame(posterior.mean)
            posterior.std = _repeat_first_frame(posterior.std)
        return posterior

    def _vae_decode(self, vae: Any, latents: Tensor) -> Tensor:
        return super()._vae_decode(vae, latents[:, :, 1:] if self._pads_latent_frames else latents)

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, C, f, h, w); `conditioning["prompt_embeds"]` is (B, 226, dim). `extra` is not used."""
        dtype, device = self.input_dtype(denoiser), noisy_latents.device
        prediction = denoiser(
            hidden_states=noisy_latents.to(dtype).transpose(1, 2),
            encoder_hidden_states=conditioning["prompt_embeds"].to(device, dtype),
            timestep=level.timestep.to(device, torch.int64),
            image_rotary_emb=self._rotary_embeddings(noisy_latents),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)

    def _rotary_embeddings(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.pipeline.transformer.config.use_rotary_positional_embeddings:
            return None
        frames, height, width = latents.shape[-3:]
        scale = self._pixels_per_latent
        prepare = self.pipeline._prepare_rotary_positional_embeddings
        return prepare(height * scale, width * scale, frames, latents.device)


def _repeat_first_frame(latents: Tensor) -> Tensor:
    """Latents (B, C, f, h, w) with a copy of their first frame in front, as the image-to-video pipeline pads."""
    return torch.cat([latents[:, :, :1], latents], dim=2)
