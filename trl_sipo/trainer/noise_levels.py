# SPDX-License-Identifier: Apache-2.0
"""Which noise levels a run trains on and is evaluated on."""

import copy
import logging

import numpy as np
import torch

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
from trl_sipo.core.timestep_sampling import TIME_SAMPLERS
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # of a time: one training timestep


def time_sampler_options(args: DiffusionPreferenceConfig) -> dict[str, float]:
    """Options of the sampler of noise levels; warns of one that has no effect."""
    if args.timestep_sampling == "stratified" and args.per_device_train_batch_size == 1:
        logger.warning(
            "`timestep_sampling='stratified'` spreads the noise levels of a batch on one device, which has one "
            "pair (`per_device_train_batch_size=1`): the levels are plain uniform ones. Raise the batch size, in "
            "place of `gradient_accumulation_steps` if need be, or set `timestep_sampling='uniform'`."
        )
    is_logit_normal = args.timestep_sampling == "logit_normal"
    return {"mean": args.logit_mean, "std": args.logit_std} if is_logit_normal else {}


def training_schedule(
    adapter: BackboneAdapter, args: DiffusionPreferenceConfig, size: tuple[int, int]
) -> VPSchedule | FlowSchedule:
    """The noise process at the size of the training media, with the shift that the settings ask for.

    Raises:
        ConfigurationError: A shift for a process that has none, an embedded guidance scale for a model that embeds
            none, or levels that the loaded denoiser does not take.
    """
    if args.embedded_guidance_scale is not None and not adapter.embeds_guidance:
        raise ConfigurationError(
            f"`embedded_guidance_scale={args.embedded_guidance_scale}` is for guidance-distilled models, but this "
            f"{adapter.pipeline_class_name} tells its denoiser no guidance scale. Remove it."
        )
    schedule = adapter.noise_schedule_for(*size, args.num_frames, args.importance_steps)
    if args.timestep_shift is not None:
        if isinstance(schedule, VPSchedule):
            raise ConfigurationError(
                f"`timestep_shift={args.timestep_shift}` shifts the levels of flow models, but this model predicts "
                f"{adapter.prediction_type!r} on a schedule of timesteps. Remove it; `timestep_sampling="
                "'logit_normal'` with a `logit_mean` leans to noisier or cleaner levels."
            )
        schedule = copy.copy(schedule)
        schedule.drawn_shift = args.timestep_shift
    # A grid that the schedule does not have is an error now, and not in the first step.
    schedule.previous_level(schedule.level_at(torch.zeros(1)), args.importance_steps)
    _check_levels(adapter, schedule, args)
    return schedule


def drawable_times(adapter: BackboneAdapter, schedule: VPSchedule | FlowSchedule) -> tuple[float, float]:
    """The times at which `schedule.level_at` gives levels that the loaded denoiser takes; (0, 1) but for experts."""
    first, last = adapter.time_range
    if isinstance(schedule, VPSchedule) or schedule.drawn_shift == schedule.shift:
        return first, last
    ratio = schedule.shift / schedule.drawn_shift  # from the sampler's time to that of the shift that is drawn with
    return tuple(ratio * time / (1 + (ratio - 1) * time) for time in (first, last))


def _check_levels(
    adapter: BackboneAdapter, schedule: VPSchedule | FlowSchedule, args: DiffusionPreferenceConfig
) -> None:
    first, last = drawable_times(adapter, schedule)
    if args.timesteps is not None:
        ends = [1000 * float(schedule.level_at(torch.tensor([time])).sigma_t) for time in (first, last)]
        refused = [timestep for timestep in args.timesteps if not ends[0] - 1 <= timestep <= ends[1] + 1]
        if (first, last) != (0.0, 1.0) and refused:
            raise ConfigurationError(
                f"`timesteps` {refused} are levels of an expert that is not loaded; the other takes {ends[0]:.0f} .. "
                f"{ends[1]:.0f}. Leave them out, or load both experts."
            )
        return
    low, high = args.timestep_range
    if low < first - _TOLERANCE or high > last + _TOLERANCE:
        raise ConfigurationError(
            f"`timestep_range={[low, high]}` holds noise levels of an expert that is not loaded; the other takes "
            f"[{first:.4f}, {last:.4f}]. Set `timestep_range` within it, or load both experts."
        )


def draw_levels(
    schedule: VPSchedule | FlowSchedule,
    args: DiffusionPreferenceConfig,
    generators: list[torch.Generator],
    options: dict[str, float],
) -> NoiseLevel:
    """One level per pair, (batch,) on the CPU, as the settings ask for.

    Args:
        generators: One CPU generator per pair.
        options: Of the sampler, from [`time_sampler_options`].
    """
    if args.timesteps is not None:
        return draw_from(args.timesteps, schedule, generators)
    sampler = TIME_SAMPLERS[args.timestep_sampling]
    if args.timestep_sampling == "stratified":
        time = sampler(len(generators), generator=generators[0])
    else:
        time = torch.cat([sampler(1, generator=generator, **options) for generator in generators])
    low, high = args.timestep_range
    return schedule.level_at(low + (high - low) * time)


def draw_from(
    timesteps: list[int], schedule: VPSchedule | FlowSchedule, generators: list[torch.Generator]
) -> NoiseLevel:
    """One of `timesteps` per generator, drawn evenly; of flow schedules they are thousandths of sigma."""
    drawn = [timesteps[int(torch.randint(len(timesteps), (), generator=generator))] for generator in generators]
    return level_of_timesteps(schedule, torch.tensor(drawn))


def evaluation_levels(
    adapter: BackboneAdapter, schedule: VPSchedule | FlowSchedule, args: DiffusionPreferenceConfig
) -> dict[float, NoiseLevel]:
    """Time to noise level (1,) of `evaluate()`: evenly spaced, or those few that are trained."""
    if args.timesteps is not None:
        return {
            timestep / 1000: level_of_timesteps(schedule, torch.tensor([timestep]))
            for timestep in sorted(set(args.timesteps))
        }
    low, high = drawable_times(adapter, schedule)
    count = args.eval_noise_levels
    times = [low + (high - low) * (position + 0.5) / count for position in range(count)]
    return {time: schedule.level_at(torch.tensor([time])) for time in times}


def level_of_timesteps(schedule: VPSchedule | FlowSchedule, timesteps: torch.Tensor) -> NoiseLevel:
    """The levels of timesteps (batch,); of flow schedules they are thousandths of sigma."""
    return schedule.level(timesteps if isinstance(schedule, VPSchedule) else timesteps / 1000)


def times_of(
    timesteps: np.ndarray, schedule: VPSchedule | FlowSchedule, args: DiffusionPreferenceConfig
) -> np.ndarray:
    """The times, as [`evaluation_levels`] has them, of timesteps (n,) as the network is told them; float64."""
    if isinstance(schedule, VPSchedule):
        return timesteps / 1000 if args.timesteps is not None else (timesteps + 0.5) / schedule.num_train_timesteps
    sigma = timesteps / schedule.timestep_scale
    return sigma if args.timesteps is not None else sigma / (schedule.drawn_shift - (schedule.drawn_shift - 1) * sigma)


def timesteps_of(
    times: np.ndarray, schedule: VPSchedule | FlowSchedule, args: DiffusionPreferenceConfig
) -> np.ndarray:
    """The inverse of [`times_of`], of times (n,); between two timesteps where a schedule has whole ones; float64."""
    if isinstance(schedule, VPSchedule):
        return 1000 * times if args.timesteps is not None else times * schedule.num_train_timesteps - 0.5
    shift = 1.0 if args.timesteps is not None else schedule.drawn_shift
    return schedule.timestep_scale * shift * times / (1 + (shift - 1) * times)
