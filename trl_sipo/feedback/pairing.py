# SPDX-License-Identifier: Apache-2.0
"""From the scores of several samples of a prompt to preference pairs. Pure: arrays in, indices out.

Several rewards are put on one scale first: each is divided by its standard deviation over all samples of all prompts
and turned so that more is better. A margin of 0.5 is half a standard deviation of a reward, whatever its unit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from trl_sipo.errors import ConfigurationError, DatasetError


@dataclass(frozen=True)
class SampleScores:
    """Scores of samples, several of each prompt.

    Attributes:
        prompt_ids: (n,), the prompt of each sample.
        scores: Reward's name -> (n,) float64 in its own unit, finite.
        higher_is_better: Reward's name -> direction.
    """

    prompt_ids: Sequence[str]
    scores: Mapping[str, np.ndarray]
    higher_is_better: Mapping[str, bool]

    def standardised(self) -> np.ndarray:
        """(n, rewards) float64 in standard deviations of each reward, larger is better.

        Raises:
            DatasetError: A reward that scores all samples alike, or one with scores that are not finite or missing.
        """
        columns = []
        for name, scores in self.scores.items():
            values = np.asarray(scores, dtype=np.float64)
            if values.shape != (len(self.prompt_ids),) or not np.isfinite(values).all():
                raise DatasetError(
                    f"Reward {name!r} has {np.isfinite(values).sum()} finite scores for {len(self.prompt_ids)} "
                    "samples; each needs one. Score them again."
                )
            if np.ptp(values) == 0:  # their standard deviation may be 1e-17
                raise DatasetError(
                    f"Reward {name!r} scores all {len(values)} samples {values[0]:g}: it prefers none. Leave it out, "
                    "or draw more samples, of prompts on which it can tell them apart."
                )
            scaled = values / values.std()
            columns.append(scaled if self.higher_is_better[name] else -scaled)
        return np.stack(columns, axis=1)

    def samples_of(self) -> dict[str, np.ndarray]:
        """Prompt id -> the indices of its samples, in the order in which the prompts first come."""
        groups: dict[str, list[int]] = {}
        for index, prompt_id in enumerate(self.prompt_ids):
            groups.setdefault(prompt_id, []).append(index)
        return {prompt_id: np.array(indices) for prompt_id, indices in groups.items()}


@dataclass(frozen=True)
class ScoredPair:
    """A preference between two samples of one prompt.

    Attributes:
        prompt_id: Of both.
        chosen, rejected: Indices into the samples.
        margin: Positive, in standard deviations; combined of the rewards' differences as `COMBINATIONS` says.
    """

    prompt_id: str
    chosen: int
    rejected: int
    margin: float


def _weighted(gains: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return gains @ weights


def _consensus(gains: np.ndarray, weights: np.ndarray) -> np.ndarray:
    least, most = gains.min(-1), gains.max(-1)
    return np.where(least > 0, least, np.where(most < 0, most, 0.0))


def _pareto(gains: np.ndarray, weights: np.ndarray) -> np.ndarray:
    dominates, is_dominated = (gains >= 0).all(-1), (gains <= 0).all(-1)
    return np.where(dominates | is_dominated, gains @ weights, 0.0)


COMBINATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    # Differences (..., rewards) and weights (rewards,) that sum to 1 -> signed margin (...,); 0: no preference.
    "weighted": _weighted,  # the weighted mean of the differences
    "consensus": _consensus,  # all rewards strictly agree; the smallest difference
    "pareto": _pareto,  # no reward disagrees, and one at least prefers; the weighted mean
}


def check_pairing(
    selection: str, combine: str, weights: Mapping[str, float], min_margin: float, reward_names: Sequence[str]
) -> None:
    """Raise [`ConfigurationError`] on options of [`make_pairs`] that make no sense."""
    if selection not in ("best_worst", "all") or combine not in COMBINATIONS:
        raise ConfigurationError(
            f"selection={selection!r} must be 'best_worst' or 'all', and combine={combine!r} one of "
            f"{', '.join(COMBINATIONS)}."
        )
    if not 0 <= min_margin < np.inf:
        raise ConfigurationError(f"min_margin={min_margin} must be at least 0 (standard deviations of the reward).")
    _shares(list(reward_names), weights)


def make_pairs(
    samples: SampleScores,
    *,
    selection: str = "best_worst",
    combine: str = "weighted",
    weights: Mapping[str, float] | None = None,
    min_margin: float = 0.0,
) -> list[ScoredPair]:
    """Preference pairs of the samples of each prompt.

    Args:
        samples: Scores by at least one reward.
        selection: "best_worst", the pair of a prompt with the largest margin, or "all", every ordered pair.
        combine: A key of `COMBINATIONS`. With one reward all are the same.
        weights: Reward's name -> weight, positive; 1 where not given. They are divided by their sum.
        min_margin: Pairs with a smaller margin are left out, as are those with none; in standard deviations.

    Returns:
        Pairs, by prompt and then by falling margin.

    Raises:
        ConfigurationError: Unknown options, weights that are not positive or of unknown rewards, a negative margin.
        DatasetError: Scores that prefer nothing.
    """
    check_pairing(selection, combine, weights or {}, min_margin, list(samples.scores))
    shares = _shares(list(samples.scores), weights or {})
    values = samples.standardised()
    pairs = []
    for prompt_id, indices in samples.samples_of().items():
        gains = values[indices, None, :] - values[None, indices, :]
        margins = COMBINATIONS[combine](gains, shares)
        chosen, rejected = np.nonzero((margins > 0) & (margins >= min_margin))
        order = np.argsort(-margins[chosen, rejected], kind="stable")
        kept = order if selection == "all" else order[:1]
        pairs += [
            ScoredPair(
                prompt_id, int(indices[chosen[k]]), int(indices[rejected[k]]), float(margins[chosen[k], rejected[k]])
            )
            for k in kept
        ]
    return pairs


def _shares(names: list[str], weights: Mapping[str, float]) -> np.ndarray:
    unknown = set(weights) - set(names)
    if not names or unknown:
        raise ConfigurationError(f"weights for {sorted(unknown)}, but the rewards are {names}.")
    given = np.array([weights.get(name, 1.0) for name in names], dtype=np.float64)
    if not (np.isfinite(given) & (given > 0)).all():
        raise ConfigurationError(f"weights must be positive, got {dict(zip(names, given.tolist(), strict=True))}.")
    return given / given.sum()


@dataclass(frozen=True)
class Conflict:
    """How two rewards rank the samples of a prompt against one another.

    Attributes:
        first, second: Names of the rewards.
        num_pairs: Pairs of samples of one prompt that both rewards tell apart.
        conflict_rate: Share of these that they rank in opposite ways; NaN of none.
        num_ties: Pairs that one of them does not tell apart.
    """

    first: str
    second: str
    num_pairs: int
    conflict_rate: float
    num_ties: int


def conflicts(samples: SampleScores) -> list[Conflict]:
    """Every two rewards' disagreement, over all pairs of samples of the same prompt."""
    values, names = samples.standardised(), list(samples.scores)
    signs = np.concatenate([_pair_signs(values[indices]) for indices in samples.samples_of().values()])
    found = []
    for first, second in combinations(range(len(names)), 2):
        product = signs[:, first] * signs[:, second]
        told, opposed = int((product != 0).sum()), int((product < 0).sum())
        rate = opposed / told if told else float("nan")
        found.append(Conflict(names[first], names[second], told, rate, len(product) - told))
    return found


def agreement_rate(samples: SampleScores) -> float:
    """Share of pairs of samples of one prompt that all rewards rank alike, none tied; NaN of no pair."""
    values = samples.standardised()
    signs = np.concatenate([_pair_signs(values[indices]) for indices in samples.samples_of().values()])
    return float((abs(signs.sum(1)) == signs.shape[1]).mean()) if len(signs) else float("nan")


def _pair_signs(values: np.ndarray) -> np.ndarray:
    """(n, rewards) -> (n (n - 1) / 2, rewards): which of the two samples each reward prefers, in -1, 0, 1."""
    first, second = np.triu_indices(len(values), k=1)
    return np.sign(values[first] - values[second])


def top_samples(
    samples: SampleScores,
    *,
    num_per_prompt: int = 1,
    quantile: float = 0.0,
    combine_weights: Mapping[str, float] | None = None,
) -> list[int]:
    """Indices of the best samples of each prompt by the weighted mean of the rewards, for supervised fine-tuning.

    Args:
        num_per_prompt: At most so many of a prompt.
        quantile: Of these, only what scores above this quantile of all samples, in [0, 1).

    Raises:
        ConfigurationError: An option out of range.
    """
    if num_per_prompt < 1 or not 0 <= quantile < 1:
        raise ConfigurationError(f"need num_per_prompt >= 1 and 0 <= quantile < 1, got {num_per_prompt}, {quantile}.")
    value = samples.standardised() @ _shares(list(samples.scores), combine_weights or {})
    threshold = np.quantile(value, quantile)
    best = []
    for indices in samples.samples_of().values():
        order = indices[np.argsort(-value[indices], kind="stable")][:num_per_prompt]
        best += [int(index) for index in order if value[index] >= threshold]
    return best
