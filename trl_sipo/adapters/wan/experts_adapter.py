# SPDX-License-Identifier: Apache-2.0
"""Wan with two experts: A14B of Wan 2.2."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor, nn

from trl_sipo.adapters.base import restore_weights
from trl_sipo.adapters.wan.adapter import WanAdapter
from trl_sipo.adapters.wan.experts import LORA_FILES, WanExperts, load_experts_lora, save_experts_lora
from trl_sipo.adapters.wrappers import unwrap_denoiser
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.errors import BackboneError, ConfigurationError


class WanExpertsAdapter(WanAdapter):
    """Adapter of `WanPipeline` with two experts (Wan 2.2 A14B), of which one may be missing (None).

    The denoiser is one module that holds both, [`WanExperts`]. A LoRA is saved as one file per expert:

        pipeline.load_lora_weights(folder)
        pipeline.load_lora_weights(
            folder, weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True
        )
    """

    optional_names = ("transformer",)
    calls_all_blocks = False
    lora_loading_code = (
        'pipe.load_lora_weights("{path}")',
        'pipe.load_lora_weights("{path}", load_into_transformer_2=True, '
        f'weight_name="{LORA_FILES["transformer_2"]}")',
    )

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        boundary = self.pipeline.config.boundary_ratio * self.noise_schedule.timestep_scale
        self._experts = WanExperts(self.pipeline.transformer, self.pipeline.transformer_2, boundary)
        self.input_layer_name = f"{self._transformer_names[0]}.{WanAdapter.input_layer_name}"

    @property
    def _transformer_names(self) -> list[str]:
        return [name for name in LORA_FILES if getattr(self.pipeline, name, None) is not None]

    def check_configuration(self) -> None:
        """As for one transformer, of both experts; refuse a PEFT model around one of them."""
        if not self._transformer_names:
            raise BackboneError("The WanPipeline has neither transformer nor transformer_2. Load at least one.")
        for name in self._transformer_names:
            if isinstance(getattr(self.pipeline, name), PeftModel):
                raise ConfigurationError(
                    f"The {name} is a PEFT model, but the two experts are wrapped together. Give the plain pipeline "
                    "and a peft_config, or load the LoRA with pipeline.load_lora_weights."
                )
        super().check_configuration()

    @property
    def denoiser(self) -> nn.Module:
        """Both experts as one module."""
        return self._experts

    def install_denoiser(self, denoiser: nn.Module) -> None:
        """Let the pipeline sample with other experts."""
        self._experts = unwrap_denoiser(denoiser)
        self.pipeline.transformer = self._experts.transformer
        self.pipeline.transformer_2 = self._experts.transformer_2

    @property
    def time_range(self) -> tuple[float, float]:
        """The times of the experts that are loaded: with one alone, those on its side of the boundary."""
        sigma, shift = self._experts.boundary_timestep / self.noise_schedule.timestep_scale, self.noise_schedule.shift
        boundary = sigma / (shift - (shift - 1) * sigma)
        low = 0.0 if self._experts.transformer_2 is not None else boundary
        high = 1.0 if self._experts.transformer is not None else boundary
        return low, high

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """As for one transformer, each sample by the expert of its level.

        Raises:
            ConfigurationError: if the expert of a level is not loaded.
        """
        self._check_levels(unwrap_denoiser(denoiser), level)
        return super().forward(denoiser, noisy_latents, level, conditioning, extra)

    def _check_levels(self, experts: WanExperts, level: NoiseLevel) -> None:
        # Within one training timestep of the boundary either expert will do: so much does UniPC round.
        above = level.timestep - experts.boundary_timestep
        for name, distance in (("transformer", above), ("transformer_2", -above)):
            if getattr(experts, name) is None and bool((distance > 1).any()):
                raise ConfigurationError(
                    f"A sample has timestep {float(level.timestep[distance.argmax()]):.1f}, a level of the {name}, "
                    f"which is not loaded (the boundary is {experts.boundary_timestep:g}). Draw levels on the other "
                    "side of it alone, or load both experts."
                )

    def sample_batch(self, prompts: Sequence[str], height: int, width: int, **options: Any) -> Tensor:
        """As for one transformer.

        Raises:
            ConfigurationError: if an expert is not loaded, since sampling passes through the levels of both.
        """
        for name in LORA_FILES:
            if getattr(self._experts, name) is None:
                raise ConfigurationError(f"Sampling needs both experts, but the {name} is not loaded.")
        return super().sample_batch(prompts, height, width, **options)

    def save_lora(self, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
        """Save the `"default"` adapter of a PEFT model, one file per expert; see the class for how to load them."""
        save_experts_lora(type(self.pipeline), denoiser, directory)

    def load_lora(self, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
        """Restore the `"default"` adapter of a PEFT model, in place, from what [`save_lora`] wrote."""
        load_experts_lora(denoiser, directory)

    def save_denoiser(self, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
        """Save the experts alone, where [`save_pipeline`] has them in its folder."""
        for name, expert in unwrap_denoiser(denoiser).experts.items():
            expert.save_pretrained(Path(directory) / name)

    def load_denoiser(self, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
        """Restore fully fine-tuned experts, in place, from a folder that [`save_pipeline`] wrote."""
        for name, expert in unwrap_denoiser(denoiser).experts.items():
            restore_weights(expert, Path(directory) / name)
