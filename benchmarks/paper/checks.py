# SPDX-License-Identifier: Apache-2.0
"""What each claim of the papers comes down to on the embedded model: comparisons of arms, checked by `rules.py`.

Each function takes the result of one question and returns its checks.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import ablation
import beta_sensitivity as beta
import gradient_through_w as gradient
import label_noise as noise
import long_training as long
import on_off_policy as policy
import static_dynamic_mask as mask
import threshold_clip as clip
from intervals import over_seeds
from protocol import ALPHAS, BETAS, CLIP_RANGES, FLIP_RATES, GOOD_BETA, PAPER_BETAS, SMALL_BETA, SOURCES
from question import BASE
from rules import (
    ALIKE,
    HOLDS,
    OPPOSITE,
    QUALITY,
    UNDECIDED,
    Check,
    by_seeds,
    higher,
    kept,
    level,
    lower,
    seeds_interval,
)

Result = Mapping[str, Any]

#: A method whose step takes less than this times Diffusion-DPO's has a moderate overhead.
MODERATE = 1.1
#: Fig. 4: below this weight are the cleanest levels up to t = 63, with a grid of 50 steps.
PAPER_CUT = 63
#: Our cut is called the paper's within this factor.
CUT_FACTOR = 2.0
#: Parts of a run whose mean losses are compared.
QUARTERS = 4


def small_beta_fails(result: Result) -> list[Check]:
    """Diffusion-DPO against the base at the smallest beta, and at the smallest of those that the paper has too."""
    return [lower(result, beta.label("DPO", value), BASE) for value in (SMALL_BETA, min(PAPER_BETAS))]


def range_is_smaller(result: Result) -> list[Check]:
    """The span of accuracies over beta, of Diffusion-DPO minus that of SIPO: over all, and over the paper's alone."""
    return [_spans(result, BETAS), _spans(result, PAPER_BETAS)]


def _spans(result: Result, betas: Sequence[float]) -> Check:
    """Whether Diffusion-DPO has the larger span, by seed."""
    spans = {method: _span(result, method, betas) for method in beta.METHODS}
    row = over_seeds([one - other for one, other in zip(spans["DPO"], spans["SIPO"], strict=True)])
    means = {method: f"{100 * fmean(values):.0f}" for method, values in spans.items()}
    text = (
        f"best minus worst beta of {min(betas):g} to {max(betas):g}: DPO {means['DPO']} points, SIPO {means['SIPO']}; "
        f"difference {100 * row['mean']:+.0f}, seeds {seeds_interval(row, '+.0f', 100)}"
    )
    return Check(text, by_seeds(row, 1))


def _span(result: Result, method: str, betas: Sequence[float]) -> list[float]:
    """By seed, the difference of the best and the worst beta."""
    arms = [result["arms"][beta.label(method, value)]["final"][QUALITY]["values"] for value in betas]
    return [max(values) - min(values) for values in zip(*arms, strict=True)]


def best_above_base(result: Result) -> list[Check]:
    """Each method at its best beta against the base."""
    return [higher(result, beta.best(result["arms"], method), BASE) for method in beta.METHODS]


def sipo_above_base(result: Result) -> list[Check]:
    """SIPO at each beta against the base."""
    return [higher(result, beta.label("SIPO", value), BASE) for value in BETAS]


def sipo_best_above(result: Result) -> list[Check]:
    """SIPO against Diffusion-DPO, each at its best beta: accuracy and distance."""
    pairs = beta.at_their_best(result["arms"])
    return [
        check
        for one, other in pairs
        for check in (higher(result, one, other), lower(result, one, other, "frechet_distance"))
    ]


def gains_first(result: Result) -> list[Check]:
    """Diffusion-DPO early against the base."""
    return [higher(result, f"{long.DPO}@{long.EARLY}", BASE)]


def collapses(result: Result) -> list[Check]:
    """Diffusion-DPO late against the base, and against itself early, at either beta."""
    arms = (long.DPO, long.DPO_OWN)
    return [lower(result, arm, other) for arm in arms for other in (BASE, f"{arm}@{long.EARLY}")]


def holds_late(result: Result) -> list[Check]:
    """DPO-C&M and SIPO late against the base, and against themselves early."""
    arms = (long.C_AND_M, long.SIPO)
    checks = [higher(result, arm, BASE) for arm in arms]
    checks += [kept(result, arm, f"{arm}@{long.EARLY}") for arm in arms]
    return checks + [lower(result, arm, f"{arm}@{long.EARLY}", "frechet_distance") for arm in arms]


def sipo_above_others(result: Result) -> list[Check]:
    """SIPO late against DPO-C&M, and against Diffusion-DPO at a beta of its own."""
    pairs = [(long.SIPO, other) for other in (long.C_AND_M, long.DPO_OWN)]
    return [check for pair in pairs for check in (higher(result, *pair), lower(result, *pair, "frechet_distance"))]


def loss_rebounds(result: Result) -> list[Check]:
    """How far the training loss rises again, of Diffusion-DPO, and beside that of SIPO."""
    logs = {label: result["arms"][label]["log"] for label in (long.DPO, long.SIPO)}
    if min(len(log) for rows in logs.values() for log in rows) < QUARTERS:
        return [Check("fewer than four losses were logged", UNDECIDED)]
    rebound = {label: [rebounds(log) for log in rows] for label, rows in logs.items()}
    row = over_seeds(rebound[long.DPO])
    difference = over_seeds([one - other for one, other in zip(*rebound.values(), strict=True)])
    text = f"last quarter of {long.DPO}'s training loss minus the lowest before: {row['mean']:+.3f}, seeds "
    more = f"more than {long.SIPO}'s: {difference['mean']:+.3f}, seeds "
    return [
        Check(text + seeds_interval(row, "+.3f"), by_seeds(row, 1)),
        Check(more + seeds_interval(difference, "+.3f"), by_seeds(difference, 1)),
    ]


def rebounds(log: Sequence[Mapping[str, float]]) -> float:
    """Mean training loss of the last quarter of a run minus the lowest of the quarters before; below 0 if it falls."""
    losses = [row["loss"] for row in log]
    ends = [len(losses) * part // QUARTERS for part in range(QUARTERS + 1)]
    means = [fmean(losses[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
    return means[-1] - min(means[:-1])


def static_widens(result: Result) -> list[Check]:
    """The margin with either static mask, and both rewards."""
    return [
        check
        for arm in (mask.STATIC, mask.WIDE)
        for check in (
            higher(result, arm, mask.DPO, "held_out_margins"),
            level(result, arm, "held_out_chosen", sign=-1, text="winner's reward still falls"),
            level(result, arm, "held_out_rejected", sign=-1, text="loser's reward falls"),
        )
    ]


def dynamic_raises_winner(result: Result) -> list[Check]:
    """Both rewards with the dynamic mask, and the margin."""
    return [
        level(result, mask.DYNAMIC, "held_out_chosen", sign=1, text="winner's reward rises"),
        level(result, mask.DYNAMIC, "held_out_rejected", sign=-1, text="loser's reward falls"),
        higher(result, mask.DYNAMIC, mask.DPO, "held_out_margins"),
    ]


def dynamic_better(result: Result) -> list[Check]:
    """The dynamic mask against none and against the static ones."""
    return [higher(result, mask.DYNAMIC, other) for other in (mask.DPO, mask.STATIC, mask.WIDE)]


def static_helps(result: Result) -> list[Check]:
    """Either static mask against none."""
    return [higher(result, arm, mask.DPO) for arm in (mask.STATIC, mask.WIDE)]


def selection_matters(result: Result) -> list[Check]:
    """The dynamic mask against one of the same rate that is dealt out by chance."""
    return [
        higher(result, mask.DYNAMIC, mask.RANDOM),
        lower(result, mask.DYNAMIC, mask.RANDOM, "frechet_distance"),
    ]


def small_epsilon_best(result: Result) -> list[Check]:
    """The default against every other epsilon but 0.2, which the paper calls close."""
    others = [clip.label(value) for value in CLIP_RANGES if value not in (0.1, 0.2)]
    return [higher(result, clip.DEFAULT, other) for other in others]


def clip_matters(result: Result) -> list[Check]:
    """A wide clip against a narrow one, at the same loose mask: at a tight one no weight reaches the clip."""
    return [lower(result, clip.BOTH, clip.MASK_ALONE)]


def threshold_matters(result: Result) -> list[Check]:
    """A loose mask against the default, at the same clip."""
    return [lower(result, clip.MASK_ALONE, clip.DEFAULT)]


def epsilon_stays_useful(result: Result) -> list[Check]:
    """Each epsilon up to 0.4 against the base."""
    return [higher(result, clip.label(value), BASE) for value in CLIP_RANGES if value <= 0.4]


def ablated(result: Result, first: str, second: str) -> list[Check]:
    """One method against another, at the small beta and at the good one."""
    return [higher(result, ablation.label(first, at), ablation.label(second, at)) for at in ablation.AT]


def c_and_m_helps(result: Result) -> list[Check]:
    """DPO-C&M against Diffusion-DPO."""
    return ablated(result, "C&M", "DPO")


def weight_alone_helps(result: Result) -> list[Check]:
    """The weight without the mask against neither."""
    return ablated(result, "weight", "DPO")


def mask_alone_helps(result: Result) -> list[Check]:
    """The mask without the weight against neither."""
    return ablated(result, "dynamic mask", "DPO")


def sipo_helps(result: Result) -> list[Check]:
    """SIPO against Diffusion-DPO."""
    return ablated(result, "SIPO", "DPO")


def weight_adds(result: Result) -> list[Check]:
    """SIPO against the mask alone and against DPO-C&M."""
    return [*ablated(result, "SIPO", "dynamic mask"), *ablated(result, "SIPO", "C&M")]


def beta_is_enough(result: Result) -> list[Check]:
    """SIPO at the small beta against Diffusion-DPO at the good one."""
    pair = (ablation.label("SIPO", SMALL_BETA), ablation.label("DPO", GOOD_BETA))
    return [higher(result, *pair), lower(result, *pair, "frechet_distance")]


def gradient_helps(result: Result) -> list[Check]:
    """The weight with its gradient against the constant one, at either beta."""
    return [higher(result, *(gradient.label(method, at) for method in gradient.METHODS)) for at in gradient.AT]


def weight_rises(result: Result) -> list[Check]:
    """The shape of w(t), and where it crosses the threshold; beside it where it does on the grid of the runs."""
    checks = []
    for source in SOURCES:
        part = result["weights"]["sources"][source]["50"]
        falls = sum(later < earlier - 1e-3 for earlier, later in zip(part["curve"], part["curve"][1:], strict=False))
        cut, coarse = (
            1000 * cut_of(found["times"], found["curve"], result["weights"]["threshold"])
            for found in (part, result["weights"]["sources"][source]["10"])
        )
        near = PAPER_CUT / CUT_FACTOR <= cut <= PAPER_CUT * CUT_FACTOR
        name = source.replace("_", "-")
        checks += [
            Check(f"w rises with t, {name}: {falls} of 49 steps fall by more than 0.001", holds_if(not falls)),
            Check(
                f"w < 0.9 up to t = {cut:.0f}, {name} (within a factor of {CUT_FACTOR:g}; on a grid of 10 steps, "
                f"up to {coarse:.0f})",
                holds_if(near),
            ),
        ]
    return checks


def holds_if(condition: bool) -> str:
    """The outcome of a measurement that has no doubt of its own: it holds, or it is the opposite."""
    return HOLDS if condition else OPPOSITE


def cut_of(times: Sequence[float], weights: Sequence[float], threshold: float) -> float:
    """The time from which on the curve stays at the threshold or above; 0 if it is never below."""
    from trl_sipo.evaluation.importance_curve import masked_regions

    return max((end for _, end in masked_regions(times, weights, threshold)), default=0.0)


def weights_lower_off_policy(result: Result) -> list[Check]:
    """Mean w of pairs of both kinds; intervals over pairs must not overlap."""
    from trl_sipo.evaluation.statistics import by_cluster, clustered_interval

    checks = []
    for grid in policy.GRIDS:
        means = [result["weights"]["sources"][source][str(grid)]["by_pair"] for source in SOURCES]
        found = [clustered_interval(by_cluster(values, range(len(values)))) for values in means]
        off, on = found
        outcome = HOLDS if off.high < on.low else OPPOSITE if off.low > on.high else UNDECIDED
        shown = [
            f"{name} {part.estimate:.3f} [{part.low:.3f}, {part.high:.3f}]"
            for name, part in zip(SOURCES, found, strict=True)
        ]
        checks.append(Check(f"mean w, grid of {grid}: {', '.join(shown).replace('_', '-')}", outcome))
    return checks


def dpo_loses_off_policy(result: Result) -> list[Check]:
    """Diffusion-DPO on off-policy pairs against the base."""
    return [lower(result, policy.label("DPO", at, "off_policy"), BASE) for at in policy.AT]


def sipo_keeps_off_policy(result: Result) -> list[Check]:
    """SIPO on off-policy pairs against the base."""
    return [kept(result, policy.label("SIPO", at, "off_policy"), BASE) for at in policy.AT]


def off_policy_is_worse(result: Result) -> list[Check]:
    """Each method on off-policy pairs against the same on the own samples of the base."""
    labels = {method: [policy.label(method, SMALL_BETA, source) for source in SOURCES] for method in policy.METHODS}
    return [lower(result, *pair) for pair in labels.values()]


def positive_alpha_helps(result: Result) -> list[Check]:
    """Positive alphas against none, on noisy labels."""
    rates, alphas = [rate for rate in FLIP_RATES if rate], [alpha for alpha in ALPHAS if alpha > 0]
    return [higher(result, noise.label(alpha, rate), noise.label(0, rate)) for rate in rates for alpha in alphas]


def negative_alpha_hurts(result: Result) -> list[Check]:
    """Negative alphas against none, on noisy labels."""
    rates, alphas = [rate for rate in FLIP_RATES if rate], [alpha for alpha in ALPHAS if alpha < 0]
    return [lower(result, noise.label(alpha, rate), noise.label(0, rate)) for rate in rates for alpha in alphas]


def clean_needs_none(result: Result) -> list[Check]:
    """Each alpha against none, on clean labels."""
    return [_not_better(result, noise.label(alpha, 0.0), noise.label(0, 0.0)) for alpha in ALPHAS if alpha]


def _not_better(result: Result, first: str, second: str) -> Check:
    """Whether the first is alike or below."""
    check = higher(result, first, second)
    outcome = {HOLDS: OPPOSITE, ALIKE: HOLDS, OPPOSITE: HOLDS}.get(check.outcome, UNDECIDED)
    return Check(check.text.replace(" above ", " not above "), outcome)


def overhead(result: Result) -> list[Check]:
    """Processor time of DPO-C&M and SIPO beside that of Diffusion-DPO."""
    checks = []
    for name in ("C&M", "SIPO"):
        row = result["objectives"][name]
        time = row["seconds_ratio"]
        outcome = HOLDS if time["high"] < MODERATE else OPPOSITE if time["low"] > MODERATE else UNDECIDED
        checks.append(
            Check(
                f"{name}: {time['mean']:.3f} [{time['low']:.3f}, {time['high']:.3f}] times the processor time of "
                f"Diffusion-DPO (below {MODERATE:g}), {row['flops_ratio']:.3f} times its operations, "
                f"{row['bytes_ratio']:.3f} times its bytes kept",
                outcome,
            )
        )
    return checks


def rounds(result: Result) -> list[Check]:
    """Accuracy by the second judge over rounds, from `reports/online/online.json`."""
    metric = "fashion-second-correct"
    checks = []
    for arm, sign, text in (("dpo", -1, "falls over rounds"), ("sipo", 1, "rises over rounds")):
        row = over_seeds([curve[-1] - curve[0] for curve in result["arms"][arm]["curves"][metric]])
        words = f"{result['arms'][arm]['label']} {text}: {100 * row['mean']:+.0f} points, seeds "
        checks.append(Check(words + seeds_interval(row, "+.0f", 100), by_seeds(row, sign)))
    row = result["differences"]["sipo minus dpo"][metric]["final"]
    words = f"SIPO above Diffusion-DPO after the last: {100 * row['mean']:+.0f} points, seeds "
    return [*checks, Check(words + seeds_interval(row, "+.0f", 100), by_seeds(row, 1))]
