# SPDX-License-Identifier: Apache-2.0
"""How far data is from a model, in numbers with intervals: errors beside those on its own samples, and what is masked.

A model's error on an image says how unlikely the image is to it, level by level; it has no scale of its own. The
scale here is the model's error on what it draws itself for the same prompts, with the same noise: the ratio of the
two is 1 for data that the model might have drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trl_sipo.core.importance import clip_log_weight, timestep_mask
from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval


@dataclass(frozen=True)
class ErrorExcess:
    """The error on some data relative to that on the model's own samples, minus 1.

    Attributes:
        overall: Geometric mean over levels and samples; 0.3 is an error 30 % above that on own samples.
        by_level: (levels,) the same at each level.
    """

    overall: Interval
    by_level: tuple[float, ...]


def error_excess(errors: Tensor, own_errors: Tensor, prompts: Sequence[str]) -> ErrorExcess:
    """Compare errors on data with those on the model's own samples of the same prompts.

    The logarithm of the ratio is averaged, with the same weight for every level: the error falls by a factor of a
    hundred from the clean to the noisy end, and a plain mean would show the clean end alone. The interval is clustered
    by prompt.

    Args:
        errors: (levels, samples) on data, positive.
        own_errors: (levels, samples) on the model's own samples, of the same prompts and noise, in the same order.
        prompts: (samples,).

    Raises:
        ConfigurationError: Tables of different shapes, or an error that is not positive, which has no ratio.
    """
    if errors.shape != own_errors.shape or errors.shape[1] != len(prompts):
        raise ConfigurationError(
            f"errors {tuple(errors.shape)} and {tuple(own_errors.shape)} of {len(prompts)} prompts do not go together."
        )
    if not (errors > 0).all() or not (own_errors > 0).all():
        raise ConfigurationError("an error of zero has no ratio: the model predicts this sample exactly.")
    log_ratio = errors.double().log() - own_errors.double().log()
    mean = clustered_interval(by_cluster(log_ratio.mean(0).tolist(), list(prompts)))
    ends = (math.expm1(min(value, 700.0)) for value in (mean.estimate, mean.low, mean.high))
    return ErrorExcess(Interval(*ends, mean.level), tuple(log_ratio.mean(1).expm1().tolist()))


def share_interval(is_so: Tensor, prompts: Sequence[str]) -> Interval:
    """The share of (levels, samples) that are so, bool, with an interval clustered by prompt."""
    return clustered_interval(by_cluster(is_so.double().mean(0).tolist(), list(prompts)), bounds=(0.0, 1.0))


@dataclass(frozen=True)
class ClipRange:
    """What one clip range and mask threshold would do to pairs at the start of training.

    Attributes:
        clip_range, mask_threshold: The settings.
        masked: Share of pairs and levels that are masked.
        clipped: Share of the kept ones whose factor is cut off by the clip range, by SIPO and by DPO-C&M.
        sipo_factor, dpo_cm_factor: Mean factor of the kept ones: of SIPO's logit, and of DPO-C&M's loss. NaN where
            none is kept.
    """

    clip_range: float
    mask_threshold: float
    masked: Interval
    clipped: tuple[float, float]
    sipo_factor: float
    dpo_cm_factor: float


def clip_ranges(
    log_weights: Tensor, prompts: Sequence[str], settings: Sequence[tuple[float, float]]
) -> list[ClipRange]:
    """Several settings on the same weights.

    Args:
        log_weights: (levels, pairs), of pairs (`core.importance.pair_log_weight`).
        prompts: (pairs,).
        settings: Pairs of clip range and mask threshold.
    """
    rows = []
    for clip_range, threshold in settings:
        keep = timestep_mask(log_weights, threshold)
        kept = log_weights[keep]
        sipo, dpo_cm = clip_log_weight(-kept, clip_range), clip_log_weight(kept, clip_range)
        rows.append(
            ClipRange(
                clip_range,
                threshold,
                share_interval(~keep, prompts),
                (_mean((sipo != -kept).float()), _mean((dpo_cm != kept).float())),
                _mean(sipo.exp()),
                _mean(dpo_cm.exp()),
            )
        )
    return rows


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else float("nan")


def distance_words(what: str, excess: Interval) -> str:
    """One sentence on an [`ErrorExcess`]."""
    size = f"{excess.estimate:+.0%} [{excess.low:+.0%}, {excess.high:+.0%}]"
    if excess.low <= 0 <= excess.high:
        reading = "the two cannot be told apart by it"
    elif excess.high < 0:
        reading = "easier to it than what it draws"
    else:
        reading = "off-policy"
    return f"The model's error on {what}, beside that on its own samples of the same prompts: {size}; {reading}."


def as_numbers(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON, which has no infinity."""
    values = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
