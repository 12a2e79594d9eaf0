# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance (Ho and Salimans, 2022) around the call of any backbone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.core.noise_schedule import NoiseLevel


class Guided:
    """Predicts as a sampler with guidance does: `null + guidance_scale * (conditional - null)`.

    Args:
        adapter: the backbone.
        guidance_scale: 1 leaves the conditional prediction as it is, at the cost of one pass instead of two.
    """

    def __init__(self, adapter: BackboneAdapter, guidance_scale: float):
        self.adapter = adapter
        self.guidance_scale = guidance_scale
        self._null: Conditioning | None = None

    def forward(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        level: NoiseLevel,
        conditioning: Mapping[str, Tensor],
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """As [`BackboneAdapter.forward`]; float32 with guidance."""
        conditional = self.adapter.forward(denoiser, noisy_latents, level, conditioning, extra)
        if self.guidance_scale == 1:
            return conditional
        null = self.adapter.forward(denoiser, noisy_latents, level, self._null_of(noisy_latents), extra).float()
        return null + self.guidance_scale * (conditional.float() - null)

    def _null_of(self, latents: Tensor) -> Conditioning:
        """What an unconditional sample is given, batched; encoded once."""
        if self._null is None:
            self._null = self.adapter.null_conditioning()
        row = {name: value.to(latents.device) for name, value in self._null.items()}
        return self.adapter.collate([row] * len(latents))
