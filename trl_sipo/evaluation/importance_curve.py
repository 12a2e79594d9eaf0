# SPDX-License-Identifier: Apache-2.0
"""The importance weight as a function of the timestep (Fig. 4 of the SIPO paper), by forward passes only."""

from collections.abc import Sequence

import torch

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.importance import log_importance_weight
from trl_sipo.core.parameterization import prediction_error, prediction_target
from trl_sipo.core.transition import rho_squared


@torch.no_grad()
def importance_weight_curve(
    adapter: BackboneAdapter,
    denoiser: torch.nn.Module,
    clean_latents: torch.Tensor,
    prompts: Sequence[str],
    timesteps: Sequence[int],
    *,
    num_steps: int = 50,
    seed: int = 0,
) -> list[float]:
    """Mean over images of w(t) = p_theta(x_s | x_t) / q(x_s | x_t, x_0), at each timestep.

    Args:
        adapter: The backbone; its schedule must be one of integer timesteps.
        denoiser: The model that is measured.
        clean_latents: (n, ...) float32, normalised.
        prompts: One per image.
        timesteps: In 0 .. T - 1.
        num_steps: Steps of the sampler grid that defines the neighbour s of t.
        seed: Of the noise, one draw per image, shared by all timesteps.

    Returns:
        One mean weight per timestep, in [0, 1].
    """
    conditioning = adapter.collate(adapter.encode_prompts(list(prompts)))
    noise = torch.randn(clean_latents.shape, generator=torch.Generator().manual_seed(seed)).to(clean_latents.device)
    was_training = denoiser.training
    denoiser.eval()
    weights = []
    for timestep in timesteps:
        level = adapter.noise_schedule.level(torch.full((len(clean_latents),), timestep, device=clean_latents.device))
        previous_level = adapter.noise_schedule.previous_level(level, num_steps)
        prediction = adapter.forward(denoiser, level.add_noise(clean_latents, noise), level, conditioning)
        target = prediction_target(clean_latents, noise, level, adapter.prediction_type)
        rho = rho_squared(level, previous_level, adapter.prediction_type)
        weights.append(log_importance_weight(prediction_error(prediction, target), rho).exp().mean().item())
    denoiser.train(was_training)
    return weights
