# SPDX-License-Identifier: Apache-2.0
"""Which beta suits a model and its data, from the model's errors on pairs alone.

Before training the policy is the reference and every margin is 0, so that margins need a change of the policy to be
measured. The smallest one that stands for training is a drift d: the policy's error falls by the share d on the chosen
sample and rises by d on the rejected one. The logit is then

    z = beta * ((chosen_error - (1 - d) * chosen_error) - (rejected_error - (1 + d) * rejected_error)) / 2
      = beta * d * scale,    scale = (chosen_error + rejected_error) / 2

with the errors of the reference. The log-sigmoid stops pushing a pair when z passes ln 99, where its gradient is one
percent of the largest: at the drift d = ln 99 / (beta * scale). So a beta sets how far the policy goes before the loss
lets go of it. With a beta that is too small no drift that leaves a working model is enough; with one that is too large
pairs are let go before they have taught anything. It is the best case for a beta: a drift that is the same on both
arms gives no more than the difference of the two errors, and real drift has both parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trl_sipo.core.beta import BETA_CONVENTIONS
from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval
from trl_sipo.trainer.statistics import SATURATED_LOGIT

DRIFTS = (0.01, 0.05, 0.20)
"""The drifts at which saturation is told: hardly any, where the trainer begins to warn, and a model that shows it."""
LEAST_DRIFT, MOST_DRIFT = DRIFTS[0], DRIFTS[-1]
"""The ends of the recommended range: at the largest beta a typical draw is let go at the one, at the smallest at the
other. A rule of thumb; Diffusion-DPO's 2000 to 5000 let Stable Diffusion 1.5 go at 1 to 4 %."""
_FAR = 10.0  # times outside the range: far too small, or far too large


@dataclass(frozen=True)
class MarginScale:
    """Margin per beta and drift.

    Attributes:
        typical: Geometric mean over levels and pairs, with an interval clustered by prompt.
        by_level: (levels,) the same at each level.
        common_by_level: (levels,) mean of |rejected_error - chosen_error| / (rejected_error + chosen_error): the
            margin of a drift that is the same on both arms, relative to one that is opposed.
    """

    typical: Interval
    by_level: tuple[float, ...]
    common_by_level: tuple[float, ...]


def opposed_scale(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The margin per beta and drift of errors (levels, pairs): (chosen + rejected) / 2, float64."""
    return (chosen.double() + rejected.double()) / 2


def margin_scale(chosen: Tensor, rejected: Tensor, prompts: Sequence[str]) -> MarginScale:
    """The scale of margins.

    Args:
        chosen, rejected: (levels, pairs), errors of the reference, levels evenly spaced over what is drawn.
        prompts: (pairs,).

    Raises:
        ConfigurationError: A pair without any error, or tables that do not go together.
    """
    if chosen.shape != rejected.shape or chosen.shape[1] != len(prompts):
        raise ConfigurationError(
            f"errors {tuple(chosen.shape)} and {tuple(rejected.shape)} of {len(prompts)} prompts do not go together."
        )
    scale = opposed_scale(chosen, rejected)
    if not (scale > 0).all():
        raise ConfigurationError("a pair has no error at all: the model predicts it exactly, and no margin can move.")
    log_scale = scale.log()
    mean = clustered_interval(by_cluster(log_scale.mean(0).tolist(), list(prompts)))
    ends = (math.exp(min(value, 700.0)) for value in (mean.estimate, mean.low, mean.high))
    common = (rejected.double() - chosen.double()).abs() / 2 / scale
    return MarginScale(
        Interval(*ends, mean.level), tuple(log_scale.mean(1).exp().tolist()), tuple(common.mean(1).tolist())
    )


def saturated_share(scale: Tensor, beta: float, drift: float) -> float:
    """Share of draws (levels, pairs) whose |z| passes ln 99 at a drift."""
    return float((beta * drift * scale > SATURATED_LOGIT).double().mean())


def saturating_drift(scale: float, beta: float) -> float:
    """The drift at which a draw of this scale is let go."""
    return SATURATED_LOGIT / (beta * scale)


@dataclass(frozen=True)
class BetaRange:
    """The betas that let a typical draw go between the two drifts.

    Attributes:
        low, high: In the Diffusion-DPO convention.
        scale: What they follow from.
    """

    low: float
    high: float
    scale: Interval

    @property
    def middle(self) -> float:
        """The geometric one."""
        return math.sqrt(self.low * self.high)

    def holds(self, beta: float) -> bool:
        """Whether a beta is in the range."""
        return self.low <= beta <= self.high


def beta_range(scale: MarginScale) -> BetaRange:
    """The recommended range."""
    typical = scale.typical.estimate
    return BetaRange(
        SATURATED_LOGIT / (MOST_DRIFT * typical), SATURATED_LOGIT / (LEAST_DRIFT * typical), scale.typical
    )


def beta_grid(middle: float) -> list[float]:
    """Three decades of betas around the middle: 1, 2 and 5 times powers of ten."""
    first = math.floor(math.log10(middle)) - 2
    steps = [factor * 10.0**power for power in range(first, first + 5) for factor in (1, 2, 5)]
    low, high = middle / 10**1.5, middle * 10**1.5
    return [value for value in steps if low <= value <= high]


def verdict(beta: float, found: BetaRange) -> tuple[str, str]:
    """What to think of a beta: a word ("good", "rather_small", "far_too_small",
    "rather_large" or "far_too_large"), and why.

    Args:
        beta: In the Diffusion-DPO convention.
    """
    drift = saturating_drift(found.scale.estimate, beta)
    typical = f"a typical draw is let go when its errors have moved apart by {drift_words(drift)}"
    span = f"{rounded(found.low)} to {rounded(found.high)}"
    if found.holds(beta):
        return "good", f"beta = {beta:g} lies in the recommended range, {span}: {typical}."
    if beta < found.low:
        ratio = found.low / beta
        if ratio > _FAR:
            return "far_too_small", (
                f"beta = {beta:g} is FAR TOO SMALL, {ratio:.0f} times below the recommended {span}: {typical} "
                "the whole error, which no model does. Only SIPO's mask brakes the push; without it a long run "
                "collapses."
            )
        return "rather_small", (
            f"beta = {beta:g} is smaller than recommended, {span}: {typical}. No fault of a run that is short, or "
            "stopped by its held-out pairs, which may do best there; a long one has little to hold it: watch "
            "`drift/chosen_error`."
        )
    ratio = beta / found.high
    if ratio > _FAR:
        return "far_too_large", (
            f"beta = {beta:g} is FAR TOO LARGE, {ratio:.0f} times above the recommended {span}: {typical}, which is "
            "less than the noise of a few steps. Pairs are let go before they have taught anything."
        )
    return "rather_large", (
        f"beta = {beta:g} is larger than recommended, {span}: {typical}. It learns less, and stays close to the "
        "reference."
    )


def mixed_up_conventions(given: float, convention: str, found: BetaRange, latent_dims: int) -> list[str]:
    """Conventions other than the one that was named, under which the number would be in the range.

    Args:
        given: As the user gave it.
        convention: In which it was taken.
        latent_dims: Numbers in one sample's latents.

    Returns:
        Names of `BETA_CONVENTIONS`, of those that scale alike the first.
    """
    names, factors = [], set()
    for name, factor in BETA_CONVENTIONS.items():
        scale = float(latent_dims) if factor is None else factor
        is_new = scale != _factor(convention, latent_dims) and scale not in factors
        if is_new and found.holds(given * scale):
            names.append(name)
            factors.add(scale)
    return names


def conversions(beta: float, latent_dims: int) -> dict[str, float]:
    """A beta of the Diffusion-DPO convention in each of `BETA_CONVENTIONS`."""
    return {name: beta / _factor(name, latent_dims) for name in BETA_CONVENTIONS}


def _factor(convention: str, latent_dims: int) -> float:
    factor = BETA_CONVENTIONS[convention]
    return float(latent_dims) if factor is None else factor


def rounded(value: float) -> str:
    """Two significant digits, without an exponent."""
    digits = 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, digits):.{max(digits, 0)}f}"


def drift_words(drift: float) -> str:
    """A drift as a share of the error, or beyond it as a multiple."""
    return f"{drift:.1%}" if drift < 1 else f"{drift:.0f} x"


@dataclass(frozen=True)
class RealMargins:
    """Margins per beta of a tuned state of the model.

    Attributes:
        margin: ((ref_error - error) of chosen - (ref_error - error) of rejected) / 2, (levels, pairs) float64.
        accuracy: Share of pairs whose margin over all levels is positive.
        chosen_drift, rejected_drift: Mean change of the error relative to the reference's.
    """

    margin: Tensor
    accuracy: Interval
    chosen_drift: Interval
    rejected_drift: Interval

    def saturated(self, beta: float) -> float:
        """Share of draws whose |z| passes ln 99."""
        return float(((beta * self.margin).abs() > SATURATED_LOGIT).double().mean())


def real_margins(base: tuple[Tensor, Tensor], tuned: tuple[Tensor, Tensor], prompts: Sequence[str]) -> RealMargins:
    """From the errors (levels, pairs) of both states on the chosen and the rejected samples, with the same noise."""
    (ref_chosen, ref_rejected), (chosen, rejected) = (
        tuple(table.double() for table in state) for state in (base, tuned)
    )
    margin = ((ref_chosen - chosen) - (ref_rejected - rejected)) / 2
    drifts = (chosen / ref_chosen - 1, rejected / ref_rejected - 1)
    won = (margin.mean(0).sign() + 1) / 2
    names = list(prompts)
    return RealMargins(
        margin,
        clustered_interval(by_cluster(won.tolist(), names), bounds=(0.0, 1.0)),
        *(clustered_interval(by_cluster(drift.mean(0).tolist(), names)) for drift in drifts),
    )
