# SPDX-License-Identifier: Apache-2.0
"""Recording what a stochastic sampler did, step by step: the data of D3PO."""

from dataclasses import dataclass
from typing import Any

import torch

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.adapters.guidance import Guided
from trl_sipo.core.noise_schedule import NoiseLevel, VPSchedule
from trl_sipo.core.parameterization import predicted_clean
from trl_sipo.core.trajectory import trajectory_timesteps
from trl_sipo.core.transition import posterior_mean_and_variance
from trl_sipo.errors import BackboneError, ConfigurationError


@dataclass(frozen=True)
class Trajectory:
    """What a sampler went through for one prompt.

    Attributes:
        prompt: It.
        latents: (steps + 1, ...) float32 on the CPU, from pure noise to the clean latents; `adapter.decode` of the
            last is the image.
        timesteps: (steps,) int64, of each state but the last.
    """

    prompt: str
    latents: torch.Tensor
    timesteps: torch.Tensor


@torch.no_grad()
def record_trajectory(
    adapter: BackboneAdapter,
    prompt: str,
    *,
    num_steps: int = 20,
    guidance_scale: float = 1.0,
    size: tuple[int, int] | None = None,
    num_frames: int = 1,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """Sample by DDIM with eta = 1, and keep every state.

    The denoiser is called as the training step does it. Train with the same `guidance_scale`: else the steps are those
    of another sampler than the one whose probabilities are raised and lowered.

    Args:
        adapter: The backbone, its parts on one device. Its denoiser is sampled from, as it is.
        prompt: What to draw.
        num_steps: Steps of the sampler.
        guidance_scale: Of classifier-free guidance; 1 is none, at half the cost.
        size: Height and width in pixels; the model's own if not given.
        num_frames: Of video models.
        generator: On the CPU. The same seed gives the same noise on any device.

    Raises:
        BackboneError: A flow model, whose sampler is not stochastic.
        ConfigurationError: Too few or too many steps.
    """
    height, width = size or adapter.default_size
    schedule = adapter.noise_schedule_for(height, width, num_frames, num_steps)
    check_is_stochastic(adapter, schedule)
    assert isinstance(schedule, VPSchedule)
    device, denoiser = next(adapter.denoiser.parameters()).device, adapter.denoiser
    timesteps = trajectory_timesteps(num_steps, schedule.num_train_timesteps)
    conditioning = {
        name: value.to(device) for name, value in adapter.collate(adapter.encode_prompts([prompt])).items()
    }
    guided = Guided(adapter, guidance_scale)
    states = [torch.randn(1, *adapter.latent_shape(height, width, num_frames), generator=generator)]
    was_training = denoiser.training
    denoiser.eval()
    try:
        for timestep in timesteps:
            level = schedule.level(torch.tensor([timestep])).to(device)
            noisy = states[-1].to(device)
            prediction = guided.forward(denoiser, noisy, level, conditioning)
            clean = predicted_clean(prediction, noisy, level, adapter.prediction_type)
            is_last = timestep == timesteps[-1]
            states.append(clean.cpu() if is_last else _drawn(noisy, clean, level, schedule, num_steps, generator))
    finally:
        denoiser.train(was_training)
    return Trajectory(prompt, torch.cat(states), torch.tensor(timesteps))


def _drawn(
    noisy: torch.Tensor,
    clean: torch.Tensor,
    level: NoiseLevel,
    schedule: VPSchedule,
    num_steps: int,
    generator: torch.Generator | None,
) -> torch.Tensor:
    mean, variance = posterior_mean_and_variance(noisy, clean, level, schedule.previous_level(level, num_steps))
    noise = torch.randn(noisy.shape, generator=generator)
    return mean.cpu() + variance.cpu().sqrt().view(-1, *[1] * (noisy.ndim - 1)) * noise


def check_is_stochastic(adapter: BackboneAdapter, schedule: Any) -> None:
    """Raise [`BackboneError`] for a model whose steps have no density."""
    if not isinstance(schedule, VPSchedule):
        raise BackboneError(
            f"{adapter.pipeline_class_name} is a flow model, whose sampler draws nothing between its steps: there are "
            "no transition probabilities to record or to train. Use a model with a diffusion schedule."
        )


def trajectory_pair(chosen: Trajectory, rejected: Trajectory) -> dict[str, Any]:
    """A row of the data of `DiffusionD3POTrainer`: `prompt`, `chosen_latents`, `rejected_latents`, `timesteps`.

    For `datasets.Dataset.from_list`, with nested lists.

    Raises:
        ConfigurationError: They are of different prompts or samplers.
    """
    if chosen.prompt != rejected.prompt or not torch.equal(chosen.timesteps, rejected.timesteps):
        raise ConfigurationError(
            f"Two trajectories are no pair: the prompts are {chosen.prompt!r} and {rejected.prompt!r}, and the steps "
            f"{len(chosen.timesteps)} and {len(rejected.timesteps)}. Record both for one prompt, by one sampler."
        )
    return {
        "prompt": chosen.prompt,
        "chosen_latents": chosen.latents.tolist(),
        "rejected_latents": rejected.latents.tolist(),
        "timesteps": chosen.timesteps.tolist(),
    }
