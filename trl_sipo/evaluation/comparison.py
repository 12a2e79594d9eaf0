# SPDX-License-Identifier: Apache-2.0
"""Models beside their base, by every reward, by category, by variety and on held-out pairs: numbers alone."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.diversity import Variety, compare_variety, within_prompt_distances
from trl_sipo.evaluation.held_out import HeldOutErrors, ImplicitPreference, implicit_preferences
from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval, holm
from trl_sipo.evaluation.win_rates import PairedComparison, compare
from trl_sipo.generation.scoring import ScoredSamples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StatisticsSettings:
    """How sure a report is.

    Args:
        level: Of the intervals.
        num_resamples: Of the bootstrap.
        seed: Of bootstrap and tests.
    """

    level: float = 0.95
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.num_resamples < 1:
            raise ConfigurationError(
                f"need 0 < level < 1 and num_resamples >= 1, got {self.level} and {self.num_resamples}."
            )


@dataclass(frozen=True)
class MetricRow:
    """One reward's view of one model, over all prompts or those of a category.

    Attributes:
        model, metric: Names.
        category: None: all prompts.
        mean: In the reward's own unit.
        against_base: None of the base itself.
        corrected_win_p_value: Holm's, over all rewards and candidates; None of the base and of categories.
    """

    model: str
    metric: str
    category: str | None
    mean: Interval
    against_base: PairedComparison | None = None
    corrected_win_p_value: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All that is said of some models.

    Attributes:
        base: Name of the model that the others are compared with.
        metrics: Over all prompts.
        categories: The same by category of the prompts, where there are any.
        variety: Candidate's name -> spread and drift; absent where the base's samples of a prompt are one, or alike.
        preferences: Candidate's name -> by noise level, all of them last.
    """

    base: str
    metrics: Sequence[MetricRow]
    categories: Sequence[MetricRow]
    variety: Mapping[str, Variety] = field(default_factory=dict)
    preferences: Mapping[str, Sequence[ImplicitPreference]] = field(default_factory=dict)


def compare_models(
    scored: Mapping[str, ScoredSamples],
    features: Mapping[str, Tensor],
    errors: Mapping[str, HeldOutErrors],
    *,
    base: str,
    beta: float,
    settings: StatisticsSettings | None = None,
) -> Comparison:
    """Compare every model with the base.

    Args:
        scored: Model's name -> scores of its samples, of the same prompts and noise for all.
        features: Model's name -> (n, features) of these samples, for variety; may be empty.
        errors: Model's name -> errors on held-out pairs; may be empty.
        base: A name of `scored`.
        beta: Of implicit rewards, in the Diffusion-DPO convention.

    Raises:
        ConfigurationError: Models whose samples do not pair.
    """
    settings = settings or StatisticsSettings()
    _check_pairing(scored, base)
    rows = [
        _metric_row(name, samples, scored[base], metric, None, settings)
        for metric in scored[base].scores
        for name, samples in scored.items()
    ]
    tested = [row for row in rows if row.against_base is not None]
    corrected = holm([row.against_base.win_p_value for row in tested if row.against_base is not None])
    by_row = {id(row): value for row, value in zip(tested, corrected, strict=True)}
    candidates = [name for name in scored if name != base]
    options = {"level": settings.level, "num_resamples": settings.num_resamples}
    prompt_ids = scored[base].prompt_ids
    has_scale = base in features and any(within_prompt_distances(features[base], prompt_ids)[0])
    if features and len(set(prompt_ids)) < len(prompt_ids) and not has_scale:
        logger.warning(
            "All samples of a prompt of %s are alike: variety and drift have no scale, and are left out.", base
        )
    return Comparison(
        base=base,
        metrics=[_with_correction(row, by_row.get(id(row))) for row in rows],
        categories=_category_rows(scored, base, settings),
        variety={
            name: compare_variety(features[base], features[name], prompt_ids, **options)
            for name in candidates
            if has_scale and name in features
        },
        preferences={
            name: implicit_preferences(errors[base], errors[name], beta=beta, **options)
            for name in candidates
            if name in errors
        },
    )


def _check_pairing(scored: Mapping[str, ScoredSamples], base: str) -> None:
    if base not in scored:
        raise ConfigurationError(f"The base {base!r} is none of the models {', '.join(scored)}.")
    keys = {name: [(s.record.prompt_id, s.index) for s in samples.samples] for name, samples in scored.items()}
    for name, samples in scored.items():
        if keys[name] != keys[base] or list(samples.scores) != list(scored[base].scores):
            raise ConfigurationError(f"The samples or scores of {name!r} do not pair with those of {base!r}.")


def _metric_row(
    name: str,
    samples: ScoredSamples,
    base: ScoredSamples,
    metric: str,
    category: str | None,
    settings: StatisticsSettings,
) -> MetricRow:
    kept = [i for i, sample in enumerate(samples.samples) if category is None or sample.record.category == category]
    prompt_ids = [samples.samples[i].record.prompt_id for i in kept]
    own, others = samples.scores[metric][kept], base.scores[metric][kept]
    options = {"level": settings.level, "num_resamples": settings.num_resamples, "seed": settings.seed}
    against = None
    if samples is not base:
        higher = samples.infos[metric].higher_is_better
        against = compare(others, own, prompt_ids, higher_is_better=higher, **options)
    return MetricRow(name, metric, category, clustered_interval(by_cluster(own, prompt_ids), **options), against)


def _with_correction(row: MetricRow, corrected: float | None) -> MetricRow:
    return MetricRow(row.model, row.metric, row.category, row.mean, row.against_base, corrected)


def _category_rows(scored: Mapping[str, ScoredSamples], base: str, settings: StatisticsSettings) -> list[MetricRow]:
    found = dict.fromkeys(sample.record.category for sample in scored[base].samples)
    categories = [category for category in found if category is not None]
    if len(found) < 2:
        return []
    return [
        _metric_row(name, samples, scored[base], metric, category, settings)
        for metric in scored[base].scores
        for category in categories
        for name, samples in scored.items()
    ]


def largest_changes(
    base: ScoredSamples, candidate: ScoredSamples, metric: str, count: int
) -> tuple[list[int], list[int]]:
    """Indices of the samples that gained most by a reward, and of those that lost most; `count` of each at most.

    Of a prompt only the largest change is taken, so that one prompt does not fill a picture.
    """
    gain = candidate.scores[metric] - base.scores[metric]
    if not candidate.infos[metric].higher_is_better:
        gain = -gain
    wins = _first_of_each_prompt(np.argsort(-gain, kind="stable"), gain > 0, candidate.prompt_ids, count)
    losses = _first_of_each_prompt(np.argsort(gain, kind="stable"), gain < 0, candidate.prompt_ids, count)
    return wins, losses


def _first_of_each_prompt(order: Any, is_wanted: Any, prompt_ids: Sequence[str], count: int) -> list[int]:
    chosen: dict[str, int] = {}
    for index in order.tolist():
        if is_wanted[index]:
            chosen.setdefault(prompt_ids[index], index)
    return list(chosen.values())[:count]
