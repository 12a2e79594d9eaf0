# SPDX-License-Identifier: Apache-2.0
"""What the transformer backbones share: which channels they take and give, and how their latents are normalised."""

from typing import Any

import torch
from torch import Tensor

from trl_sipo.core.transfer import to_device
from trl_sipo.errors import BackboneError


def check_channels(name: str, *, takes: int, gives: int, latents: int, patch: int = 1, way_out: str) -> None:
    """Refuse a transformer that takes more than noisy latents, or gives something else.

    Args:
        name: of the transformer in its pipeline.
        takes, gives: its input and output channels.
        latents: channels of the VAE's latents.
        patch: height and width of the patches of latents that the transformer is given for channels.
        way_out: what models with other channels usually are, and what to use instead.

    Raises:
        BackboneError: naming the channels and the way out.
    """
    needed = latents * patch**2
    unit = "the VAE's latents" if patch == 1 else f"{patch}x{patch} patches of the VAE's latents"
    for side, channels in (("takes", takes), ("gives", gives)):
        if channels != needed:
            raise BackboneError(f"The {name} {side} {channels} channels but {unit} have {needed}: {way_out}")


def shift_and_scale(vae: Any, latents: Tensor) -> Tensor:
    """Less the VAE's `shift_factor`, times its `scaling_factor`."""
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def undo_shift_and_scale(vae: Any, latents: Tensor) -> Tensor:
    """Inverse of [`shift_and_scale`]."""
    return latents / vae.config.scaling_factor + vae.config.shift_factor


def channel_statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, by the VAE's configuration, shaped for latents (B, C, ...)."""
    per_channel = (-1, *[1] * (latents.ndim - 2))
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std]).to(latents.dtype)
    mean, std = to_device(statistics, latents.device)
    return mean.view(per_channel), std.view(per_channel)
