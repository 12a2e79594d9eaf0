# SPDX-License-Identifier: Apache-2.0
"""How far a policy is from the data that it learns from: its importance weights on the pairs of a round.

The weight is the one that SIPO clips and masks by, w = p_theta(x_s | x_t) / q(x_s | x_t, x_0), shared by the two arms
of a pair (`trl_sipo.core.importance`). It is at most 1. On pairs that the policy drew itself it is as large as it gets
for this model; on pairs of earlier rounds it is the smaller, the further the policy has moved away from them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.importance import timestep_mask
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.data.seeding import seeded_generator
from trl_sipo.errors import NumericalError
from trl_sipo.evaluation.importance_curve import PairWeights, pair_weights, stratum_midpoints
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.encoding import PairEncoder, draw_noise
from trl_sipo.trainer.noise_levels import training_schedule
from trl_sipo.trainer.preference_data import as_tensors

_BATCH = 16


@dataclass(frozen=True)
class OffPolicyWeights:
    """Importance weights of one policy on the pairs of one round, over pairs and noise levels.

    Attributes:
        policy: Rounds that the policy has been trained for; 0 is the base model.
        data: The round whose pairs these are.
        pairs: How many were measured.
        mean: Of the weight.
        masked_share: Share of weights below the mask threshold.
        effective_share: Kish's effective sample size of the weights, sum(w)^2 / sum(w^2), divided by their number.
        times: Of the noise levels; 0 is clean, 1 pure noise.
        mean_by_time, masked_by_time: The same at each level.
    """

    policy: int
    data: int
    pairs: int
    mean: float
    masked_share: float
    effective_share: float
    times: tuple[float, ...]
    mean_by_time: tuple[float, ...]
    masked_by_time: tuple[float, ...]


def effective_share(weights: Tensor) -> float:
    """Kish's effective sample size, sum(w)^2 / sum(w^2), per weight: 1 where all are equal; 0 where all vanish."""
    weights = weights.double()
    squares = (weights**2).sum()
    return float(weights.sum() ** 2 / squares / weights.numel()) if squares > 0 else 0.0


@torch.no_grad()
def off_policy_weights(
    adapter: BackboneAdapter,
    rows: Any,
    args: DiffusionPreferenceConfig,
    *,
    policy: int,
    data: int,
    num_pairs: int,
    num_levels: int,
    seed: int,
) -> OffPolicyWeights:
    """Measure a policy on evenly spaced pairs of a dataset, by forward passes only.

    Args:
        adapter: Of the policy, its LoRA on.
        rows: A preference dataset.
        args: Resolution, frames, `importance_steps` and, where the method masks, its threshold.
        policy, data: Numbers of the two, for the record.
        num_pairs: At most so many pairs.
        num_levels: Noise levels, in the middle of equal strata of the schedule.
        seed: Of the noise, one draw per pair, shared by all levels and all policies.

    Raises:
        NumericalError: An error that is not finite.
    """
    size = args.size or adapter.default_size
    schedule = training_schedule(adapter, args, size)
    times = stratum_midpoints(num_levels)
    levels = schedule.level_at(times)
    count = min(num_pairs, len(rows))
    chosen = rows.select([place * len(rows) // count for place in range(count)])
    pairs = as_tensors(chosen, adapter, args, size, f"round {data}")
    collate, device = DataCollatorForDiffusionPreference(), adapter.pipeline.device
    encode = PairEncoder(adapter, sample_posterior=False, caption_dropout=0.0)
    parts = []
    for start in range(0, count, _BATCH):
        numbers = range(start, min(start + _BATCH, count))
        batch = encode(collate([pairs[number] for number in numbers]), device, [], training=False)
        noise = draw_noise(batch.chosen_latents, [seeded_generator(seed, number) for number in numbers])
        options = {"schedule": schedule, "num_steps": args.importance_steps}
        parts.append(pair_weights(adapter, adapter.denoiser, batch, noise, levels, **options))
    log_weights = PairWeights.join(parts).pair
    if not log_weights.isfinite().all():
        raise NumericalError(f"The policy's error is not finite on pairs of round {data}: it has diverged.")
    weights, masked = log_weights.exp(), ~timestep_mask(log_weights, mask_threshold(args))
    return OffPolicyWeights(
        policy=policy,
        data=data,
        pairs=count,
        mean=float(weights.mean()),
        masked_share=float(masked.float().mean()),
        effective_share=effective_share(weights),
        times=tuple(times.tolist()),
        mean_by_time=tuple(weights.mean(1).tolist()),
        masked_by_time=tuple(masked.float().mean(1).tolist()),
    )


def mask_threshold(args: DiffusionPreferenceConfig) -> float:
    """The weight below which the method masks; of methods that do not, that of SIPO's own default, 0.9."""
    threshold = getattr(args, "mask_threshold", None)
    return 1 - getattr(args, "clip_range", 0.1) if threshold is None else threshold
