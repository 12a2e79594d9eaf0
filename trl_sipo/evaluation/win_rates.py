# SPDX-License-Identifier: Apache-2.0
"""How often one model's sample scores better than another's from the same prompt and the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval, sign_flip_test


@dataclass(frozen=True)
class PairedComparison:
    """One reward's verdict on two models.

    Attributes:
        win_rate: Share of samples in which the candidate scores better; a tie counts one half.
        difference: Candidate minus base, in the reward's unit, averaged.
        win_p_value: Of "neither wins more often".
        difference_p_value: Of "the scores are alike".
        num_samples, num_prompts, num_ties: What it was computed from.
    """

    win_rate: Interval
    difference: Interval
    win_p_value: float
    difference_p_value: float
    num_samples: int
    num_prompts: int
    num_ties: int


def paired_outcomes(base: Sequence[float], candidate: Sequence[float], *, higher_is_better: bool = True) -> np.ndarray:
    """1 where the candidate is better, 0 where the base is, 1/2 where they score alike; float64 (n,).

    Raises:
        ConfigurationError: Different lengths.
    """
    if len(base) != len(candidate):
        raise ConfigurationError(f"{len(base)} scores of the base and {len(candidate)} of the candidate do not pair.")
    gain = np.asarray(candidate, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    return (np.sign(gain if higher_is_better else -gain) + 1) / 2


def compare(
    base: Sequence[float],
    candidate: Sequence[float],
    prompt_ids: Sequence[object],
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> PairedComparison:
    """Compare the scores of two models, sample by sample.

    Args:
        base: (n,) scores.
        candidate: (n,) scores of the samples from the same prompts and the same noise.
        prompt_ids: (n,); samples of one prompt are not taken for independent.
        level: Of the intervals.
        num_resamples: Of the bootstrap.
        seed: Of bootstrap and test.

    Raises:
        ConfigurationError: Lengths that differ, no scores, or one that is not finite.
    """
    outcomes = paired_outcomes(base, candidate, higher_is_better=higher_is_better)
    wins = by_cluster(outcomes, prompt_ids)
    gains = by_cluster(np.asarray(candidate, dtype=np.float64) - np.asarray(base, dtype=np.float64), prompt_ids)
    options = {"level": level, "num_resamples": num_resamples, "seed": seed}
    return PairedComparison(
        win_rate=clustered_interval(wins, bounds=(0.0, 1.0), **options),
        difference=clustered_interval(gains, **options),
        win_p_value=sign_flip_test(wins, null=0.5, seed=seed),
        difference_p_value=sign_flip_test(gains, seed=seed),
        num_samples=len(outcomes),
        num_prompts=len(wins.sums),
        num_ties=int((outcomes == 0.5).sum()),
    )
