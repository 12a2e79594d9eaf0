# SPDX-License-Identifier: Apache-2.0
"""FLUX.2: any checkpoint whose pipeline class is `Flux2Pipeline` (dev) or `Flux2KleinPipeline`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.adapters.flow_scheduler import flow_noise_schedule
from trl_sipo.adapters.transformer import check_channels
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel
from trl_sipo.core.transfer import to_device


class Flux2Adapter(BackboneAdapter):
    """Adapter of `Flux2Pipeline`: Mistral text encoder, and a transformer distilled to take a guidance scale.

    Latents are the VAE's in 2x2 patches, (B, 4 * C, h / 2, w / 2), since the VAE's batch-norm statistics normalise
    them in this layout. `extra["guidance_scale"]` gives the scale.
    """

    pipeline_class_name = "Flux2Pipeline"
    denoiser_name = "transformer"
    prediction_type = "flow_prediction"
    frozen_names = ("vae", "text_encoder")
    # One expression, since the end "to_out" would also match the module lists around "to_out.0".
    lora_target_modules = (
        r".*\.(to_q|to_k|to_v|to_out\.0|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out"
    )
    input_layer_name = "x_embedder"

    def check_configuration(self) -> None:
        """Refuse transformers whose channels are not those of a patch."""
        transformer = self.pipeline.transformer.config
        check_channels(
            "transformer",
            takes=transformer.in_channels,
            gives=transformer.out_channels or transformer.in_channels,
            latents=self.pipeline.vae.config.latent_channels,
            patch=2,
            way_out="another kind of model. Use a plain text-to-image checkpoint.",
        )
        # Read once here, so that a wrong scheduler is an error of the constructor.
        _ = self.noise_schedule

    @cached_property
    def noise_schedule(self) -> FlowSchedule:
        """The flow at the default size, with sigma itself for the timestep."""
        return self.noise_schedule_for(*self.default_size)

    def noise_schedule_for(self, height: int, width: int, num_frames: int = 1, num_steps: int = 50) -> FlowSchedule:
        """Shifted further towards noise the larger the image, and the fewer the sampler's steps."""
        _, rows, columns = self.latent_shape(height, width, num_frames)
        mu = compute_empirical_mu(rows * columns, num_steps)
        return flow_noise_schedule(self.pipeline.scheduler, timestep_scale=1.0, mu=mu)

    @property
    def spatial_multiple(self) -> int:
        """16 for the published checkpoints: 8 pixels per latent of the VAE, 2 of them per patch."""
        return 2 * self.pipeline.vae_scale_factor

    @property
    def default_size(self) -> tuple[int, int]:
        """1024 x 1024 for the published checkpoints."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """`prompt_embeds` (512, dim) per prompt: three hidden states of the text encoder, beside one another.

        The transformer attends the padding too, so the embeddings keep it.
        """
        if not prompts:
            return []
        with self._frozen_inference("text_encoder") as text_encoder:
            embeds, _ = self.pipeline.encode_prompt(
                list(prompts),
                device=text_encoder.device,
                max_sequence_length=call_default(self.pipeline, "max_sequence_length"),
            )
        # Cloned: a row of the batch would keep all of it in memory, and in a cache on disk.
        return [{"prompt_embeds": row.clone()} for row in embeds]

    def latent_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(128, height / 16, width / 16) for the published checkpoints."""
        self.validate_size(height, width, num_frames)
        multiple = self.spatial_multiple
        return 4 * self.pipeline.vae.config.latent_channels, height // multiple, width // multiple

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Patches, standardised by the mean and variance of each channel that the VAE keeps in its batch norm."""
        mean, std = self._channel_statistics(latents)
        return (latents - mean) / std

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Patches with the mean and variance that the VAE gives them."""
        mean, std = self._channel_statistics(latents)
        return latents * std + mean

    def _channel_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, 4 * C, 1, 1) of the VAE's latents in patches, in the latents' dtype."""
        vae = self.pipeline.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        return mean.to(latents), std.to(latents)

    def _vae_encode(self, vae: Any, pixels: Tensor) -> DiagonalGaussianDistribution:
        mean, log_variance = vae.encode(pixels).latent_dist.parameters.chunk(2, dim=1)
        patchify = self.pipeline._patchify_latents
        return DiagonalGaussianDistribution(torch.cat([patchify(mean), patchify(log_variance)], dim=1))

    def _vae_decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(self.pipeline._unpatchify_latents(latents), return_dict=False)[0]

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Prediction (B, 4 * C, h, w); to the transformer each position is a token, (B, h * w, 4 * C)."""
        pipeline, dtype, device = self.pipeline, self.input_dtype(denoiser), noisy_latents.device
        prompt_embeds = conditioning["prompt_embeds"].to(device, dtype)
        prediction = denoiser(
            hidden_states=pipeline._pack_latents(noisy_latents.to(dtype)),
            # Rounded as the pipeline rounds it: sigma * 1000 to the embeddings' dtype, and divided there.
            timestep=(level.timestep.to(device) * 1000).to(dtype) / 1000,
            guidance=self._guidance(noisy_latents, extra),
            encoder_hidden_states=prompt_embeds,
            txt_ids=to_device(pipeline._prepare_text_ids(prompt_embeds), device),
            img_ids=to_device(pipeline._prepare_latent_ids(noisy_latents), device),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).unflatten(2, noisy_latents.shape[2:])

    @property
    def embeds_guidance(self) -> bool:
        """True: the pipeline gives it to every checkpoint."""
        return True

    def _guidance(self, noisy_latents: Tensor, extra: Mapping[str, Any] | None) -> Tensor | None:
        """The guidance scale (B,) float32 that the transformer embeds; None for a transformer that embeds none."""
        if not self.embeds_guidance:
            return None
        scale = (extra or {}).get("guidance_scale", call_default(self.pipeline, "guidance_scale"))
        return torch.full((len(noisy_latents),), scale, dtype=torch.float32, device=noisy_latents.device)


class Flux2KleinAdapter(Flux2Adapter):
    """Adapter of `Flux2KleinPipeline`: Qwen3 text encoder, and classifier-free guidance against the empty prompt.

    A step-distilled klein (`is_distilled`) samples without guidance; its transformer is called in the same way.
    """

    pipeline_class_name = "Flux2KleinPipeline"

    @property
    def embeds_guidance(self) -> bool:
        """False."""
        return False
