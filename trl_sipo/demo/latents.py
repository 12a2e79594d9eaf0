# SPDX-License-Identifier: Apache-2.0
"""Many images through the demo's autoencoder, in batches and without gradients. Latents are scaled, as in training."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

CODING_BATCH = 250


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, 32, 32) in [-1, 1] -> mean and standard deviation of the scaled latents, float32 (N, 4, 8, 8)."""
    posteriors = [vae.encode(part.to(device)).latent_dist for part in pixels.split(CODING_BATCH)]
    scale = vae.config.scaling_factor
    return scale * torch.cat([p.mean.cpu() for p in posteriors]), scale * torch.cat([p.std.cpu() for p in posteriors])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Scaled latents (N, 4, 8, 8) -> pixels float32 (N, 3, 32, 32), clipped to [-1, 1]."""
    unscaled = latents / vae.config.scaling_factor
    parts = [vae.decode(part.to(device), return_dict=False)[0].cpu() for part in unscaled.split(CODING_BATCH)]
    return torch.cat(parts).clamp(-1, 1)
