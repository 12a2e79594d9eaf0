# SPDX-License-Identifier: Apache-2.0
"""The claims of the papers, what each rests on here, and the checks that decide it.

A claim is checked on the results of one question, by the rules of `rules.py`. Nothing here knows a number of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from protocol import ALPHAS, BETAS, FLIP_RATES, GOOD_BETA, SMALL_BETA, SOURCES
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


@dataclass(frozen=True)
class Claim:
    """One row of the page.

    Attributes:
        text: What is claimed.
        place: Where in the paper.
        paper: Its numbers.
        question: Whose result decides it; empty where nothing here can.
        checks: From that result; of a claim that cannot be said here, none.
        reason: Why nothing here can decide it, or what to know about the measurement.
    """

    text: str
    place: str
    paper: str
    question: str = ""
    checks: Callable[[Result], Sequence[Check]] = lambda result: ()
    reason: str = ""


def _small_beta_fails(result: Result) -> list[Check]:
    labels = [beta.label("DPO", SMALL_BETA, source) for source in SOURCES]
    return [lower(result, label, BASE) for label in labels]


def _range_is_smaller(result: Result) -> list[Check]:
    checks = []
    for source in SOURCES:
        spans = {method: _span(result, method, source) for method in beta.METHODS}
        row = over_seeds([one - other for one, other in zip(spans["DPO"], spans["SIPO"], strict=True)])
        means = {method: f"{100 * fmean(values):.0f}" for method, values in spans.items()}
        text = (
            f"best minus worst beta, {source.replace('_', '-')}: DPO {means['DPO']} points, SIPO {means['SIPO']}; "
            f"difference {100 * row['mean']:+.0f}, seeds {seeds_interval(row, '+.0f', 100)}"
        )
        checks.append(Check(text, by_seeds(row, 1)))
    return checks


def _span(result: Result, method: str, source: str) -> list[float]:
    """By seed, the difference of the best and the worst beta."""
    arms = [result["arms"][beta.label(method, value, source)]["final"][QUALITY]["values"] for value in BETAS]
    return [max(values) - min(values) for values in zip(*arms, strict=True)]


def _sipo_above_base(result: Result) -> list[Check]:
    return [higher(result, beta.label("SIPO", value, source), BASE) for source in SOURCES for value in BETAS]


def _sipo_best_above(result: Result) -> list[Check]:
    pairs = beta.at_their_best(result["arms"])
    return [
        check
        for one, other in pairs
        for check in (higher(result, one, other), lower(result, one, other, "frechet_distance"))
    ]


def _gains_first(result: Result) -> list[Check]:
    return [higher(result, f"{long.DPO}@{long.EARLY}", BASE)]


def _collapses(result: Result) -> list[Check]:
    return [lower(result, long.DPO, BASE), lower(result, long.DPO, f"{long.DPO}@{long.EARLY}")]


def _holds_late(result: Result) -> list[Check]:
    arms = (long.C_AND_M, long.SIPO)
    checks = [higher(result, arm, BASE) for arm in arms]
    checks += [kept(result, arm, f"{arm}@{long.EARLY}") for arm in arms]
    return checks + [lower(result, arm, f"{arm}@{long.EARLY}", "frechet_distance") for arm in arms]


def _sipo_above_own_dpo(result: Result) -> list[Check]:
    return [
        higher(result, long.SIPO, long.DPO_OWN),
        lower(result, long.SIPO, long.DPO_OWN, "frechet_distance"),
        higher(result, long.SIPO, long.C_AND_M),
    ]


def _loss_rebounds(result: Result) -> list[Check]:
    rebound = {label: [rebounds(log) for log in result["arms"][label]["log"]] for label in (long.DPO, long.SIPO)}
    row = over_seeds(rebound[long.DPO])
    difference = over_seeds([one - other for one, other in zip(*rebound.values(), strict=True)])
    text = f"last quarter of {long.DPO}'s training loss minus its lowest: {row['mean']:+.3f}, seeds "
    more = f"more than {long.SIPO}'s: {difference['mean']:+.3f}, seeds "
    return [
        Check(text + seeds_interval(row, "+.3f"), by_seeds(row, 1)),
        Check(more + seeds_interval(difference, "+.3f"), by_seeds(difference, 1)),
    ]


def rebounds(log: Sequence[Mapping[str, float]]) -> float:
    """Mean training loss of the last quarter of a run minus that of the quarter where it is lowest; at least 0."""
    losses = [row["loss"] for row in log]
    size = max(1, len(losses) // 4)
    quarters = [fmean(losses[start : start + size]) for start in range(0, size * (len(losses) // size), size)]
    return quarters[-1] - min(quarters)


def _static_widens(result: Result) -> list[Check]:
    return [
        higher(result, mask.STATIC, mask.DPO, "held_out_margins"),
        level(result, mask.STATIC, "held_out_chosen", sign=-1, text="winner's reward still falls"),
        level(result, mask.STATIC, "held_out_rejected", sign=-1, text="loser's reward falls"),
    ]


def _dynamic_raises_winner(result: Result) -> list[Check]:
    return [
        level(result, mask.DYNAMIC, "held_out_chosen", sign=1, text="winner's reward rises"),
        level(result, mask.DYNAMIC, "held_out_rejected", sign=-1, text="loser's reward falls"),
        higher(result, mask.DYNAMIC, mask.DPO, "held_out_margins"),
    ]


def _dynamic_better(result: Result) -> list[Check]:
    return [higher(result, mask.DYNAMIC, mask.DPO), higher(result, mask.DYNAMIC, mask.STATIC)]


def _static_helps(result: Result) -> list[Check]:
    return [higher(result, mask.STATIC, mask.DPO)]


def _selection_matters(result: Result) -> list[Check]:
    return [
        higher(result, mask.DYNAMIC, mask.RANDOM),
        lower(result, mask.DYNAMIC, mask.RANDOM, "frechet_distance"),
    ]


def _small_epsilon_best(result: Result) -> list[Check]:
    others = [clip.label(value) for value in clip.CLIP_RANGES if value not in (0.1, 0.2)]
    return [higher(result, clip.DEFAULT, other) for other in others]


def _clip_matters(result: Result) -> list[Check]:
    return [lower(result, clip.CLIP_ALONE, clip.DEFAULT)]


def _threshold_matters(result: Result) -> list[Check]:
    return [lower(result, clip.MASK_ALONE, clip.DEFAULT)]


def _epsilon_stays_useful(result: Result) -> list[Check]:
    return [higher(result, clip.label(value), BASE) for value in clip.CLIP_RANGES]


def _ablated(first: str, second: str) -> Callable[[Result], list[Check]]:
    def checks(result: Result) -> list[Check]:
        return [higher(result, ablation.label(first, at), ablation.label(second, at)) for at in ablation.AT]

    return checks


def _beta_is_enough(result: Result) -> list[Check]:
    pair = (ablation.label("SIPO", SMALL_BETA), ablation.label("DPO", GOOD_BETA))
    return [higher(result, *pair), lower(result, *pair, "frechet_distance")]


def _gradient_helps(result: Result) -> list[Check]:
    return [higher(result, *(gradient.label(method, at) for method in gradient.METHODS)) for at in gradient.AT]


def _weight_rises(result: Result) -> list[Check]:
    checks = []
    for source in SOURCES:
        part = result["weights"]["sources"][source]["50"]
        falls = sum(later < earlier - 1e-3 for earlier, later in zip(part["curve"], part["curve"][1:], strict=False))
        cut = 1000 * cut_of(part["times"], part["curve"], result["weights"]["threshold"])
        near = PAPER_CUT / CUT_FACTOR <= cut <= PAPER_CUT * CUT_FACTOR
        name = source.replace("_", "-")
        checks += [
            Check(f"w rises with t, {name}: {falls} of 49 steps fall by more than 0.001", holds_if(not falls)),
            Check(f"w < 0.9 up to t = {cut:.0f}, {name} (within a factor of {CUT_FACTOR:g})", holds_if(near)),
        ]
    return checks


def holds_if(condition: bool) -> str:
    """The outcome of a measurement that has no doubt of its own: it holds, or it is the opposite."""
    return HOLDS if condition else OPPOSITE


def cut_of(times: Sequence[float], weights: Sequence[float], threshold: float) -> float:
    """The time from which on the curve stays at the threshold or above; 0 if it is never below."""
    from trl_sipo.evaluation.importance_curve import masked_regions

    return max((end for _, end in masked_regions(times, weights, threshold)), default=0.0)


def _weights_lower_off_policy(result: Result) -> list[Check]:
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


def _dpo_loses_off_policy(result: Result) -> list[Check]:
    return [lower(result, policy.label("DPO", at, "off_policy"), BASE) for at in policy.AT]


def _sipo_keeps_off_policy(result: Result) -> list[Check]:
    return [kept(result, policy.label("SIPO", at, "off_policy"), BASE) for at in policy.AT]


def _off_policy_is_worse(result: Result) -> list[Check]:
    pairs = [(policy.label(method, SMALL_BETA, source) for source in SOURCES) for method in policy.METHODS]
    return [lower(result, *pair) for pair in pairs]


def _positive_alpha_helps(result: Result) -> list[Check]:
    rates, alphas = [rate for rate in FLIP_RATES if rate], [alpha for alpha in ALPHAS if alpha > 0]
    return [higher(result, noise.label(alpha, rate), noise.label(0, rate)) for rate in rates for alpha in alphas]


def _negative_alpha_hurts(result: Result) -> list[Check]:
    rates, alphas = [rate for rate in FLIP_RATES if rate], [alpha for alpha in ALPHAS if alpha < 0]
    return [lower(result, noise.label(alpha, rate), noise.label(0, rate)) for rate in rates for alpha in alphas]


def _clean_needs_none(result: Result) -> list[Check]:
    return [_not_better(result, noise.label(alpha, 0.0), noise.label(0, 0.0)) for alpha in ALPHAS if alpha]


def _not_better(result: Result, first: str, second: str) -> Check:
    """Whether the first is alike or below."""
    check = higher(result, first, second)
    outcome = {HOLDS: OPPOSITE, ALIKE: HOLDS, OPPOSITE: HOLDS}.get(check.outcome, UNDECIDED)
    return Check(check.text.replace(" above ", " not above "), outcome)


def _overhead(result: Result) -> list[Check]:
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


def _rounds(result: Result) -> list[Check]:
    """From `reports/online/online.json`: accuracy by the second judge."""
    metric = "fashion-second-correct"
    checks = []
    for arm, sign, text in (("dpo", -1, "falls over rounds"), ("sipo", 1, "rises over rounds")):
        row = over_seeds([curve[-1] - curve[0] for curve in result["arms"][arm]["curves"][metric]])
        words = f"{result['arms'][arm]['label']} {text}: {100 * row['mean']:+.0f} points, seeds "
        checks.append(Check(words + seeds_interval(row, "+.0f", 100), by_seeds(row, sign)))
    row = result["differences"]["sipo minus dpo"][metric]["final"]
    words = f"SIPO above Diffusion-DPO after the last: {100 * row['mean']:+.0f} points, seeds "
    return [*checks, Check(words + seeds_interval(row, "+.0f", 100), by_seeds(row, 1))]


SIPO_PAPER = (
    Claim(
        "With a small beta Diffusion-DPO falls far below the pretrained model",
        "Fig. 1a, 8c, Sec. 4.3",
        "Plot without numbers: far below the baseline at the smallest beta, peak at beta 1 (1000 in this library)",
        "beta_sensitivity",
        _small_beta_fails,
    ),
    Claim(
        "SIPO varies less over three decades of beta",
        "Fig. 8c, Sec. 4.3",
        "Plot: only minor variation from 0.02 to 10 (20 to 10000 here)",
        "beta_sensitivity",
        _range_is_smaller,
    ),
    Claim(
        "SIPO is above the pretrained model at every beta",
        "Sec. 4.3",
        '"consistently outperforming the baseline", also at 0.02',
        "beta_sensitivity",
        _sipo_above_base,
    ),
    Claim(
        "At the best beta of each, SIPO is better than Diffusion-DPO",
        "Tables 1, 2",
        "SD1.5: HPS 0.2763 against 0.2753, PickScore 22.01 against 21.89; CogVideoX-2B: 81.53 against 81.16",
        "beta_sensitivity",
        _sipo_best_above,
        "Beta is chosen by the first verifier, the claim checked by the second and by distance.",
    ),
    Claim(
        "Diffusion-DPO gains at first",
        "Table 1, 500 steps",
        "VBench 81.16 against 80.91 of the pretrained CogVideoX-2B",
        "long_training",
        _gains_first,
    ),
    Claim(
        "Diffusion-DPO collapses in longer training",
        "Table 1, 1000 steps; Fig. 1c, 8a, 8b",
        "VBench 67.28 against 80.91 and 81.16",
        "long_training",
        _collapses,
        "At a small beta. The arm with a beta of its own is in the table below, and does not collapse.",
    ),
    Claim(
        "DPO-C&M and SIPO stay above the pretrained model and go on improving",
        "Table 1, 1000 steps",
        "C&M 81.37 then 81.46, SIPO 81.53 then 81.68; pretrained 80.91",
        "long_training",
        _holds_late,
        "Improving: not less accurate, and closer to real photographs, than earlier.",
    ),
    Claim(
        "SIPO is better than Diffusion-DPO at its own beta, and than DPO-C&M",
        "Tables 1, 2, A1",
        "CogVideoX-2B: 81.53, 81.16, 81.37; Diffusion-DPO at beta 2 (2000 here), the others at 0.02 (20)",
        "long_training",
        _sipo_above_own_dpo,
    ),
    Claim(
        "Diffusion-DPO's training loss rises late, SIPO's falls smoothly",
        "Fig. 1b",
        "Plot without numbers",
        "long_training",
        _loss_rebounds,
        "A masked pair counts as a loss of zero, so that SIPO's falls as the mask closes, whatever is learned.",
    ),
    Claim(
        "w(t) rises with t, and is below 0.9 on t of 0 to 63",
        "Fig. 4, Sec. 3.1",
        "w < 0.9 for t <= 63 (SD1.5 on Pick-a-Pic)",
        "on_off_policy",
        _weight_rises,
        "The base model, by forward passes, on a grid of 50 steps, with which the paper's figure is reached.",
    ),
    Claim(
        "A static mask of the cleanest levels widens the margin, while both rewards still fall",
        "Fig. 2b, Sec. 3.1",
        "Plot: training on t of 60 to 1000",
        "static_dynamic_mask",
        _static_widens,
    ),
    Claim(
        "A static mask stabilises training",
        "Fig. 2b, Sec. 3.1",
        '"discarding timesteps with low importance weights improves the stability"',
        "static_dynamic_mask",
        _static_helps,
    ),
    Claim(
        "With the dynamic mask the winner's reward rises, the loser's falls, and the margin widens",
        "Fig. 2c, Sec. 3.1",
        "Plot",
        "static_dynamic_mask",
        _dynamic_raises_winner,
        "Rewards of held-out pairs.",
    ),
    Claim(
        "The dynamic mask is better than the static one, and than none",
        "Sec. 3.1",
        "Plot: more stable rewards",
        "static_dynamic_mask",
        _dynamic_better,
    ),
    Claim(
        "It matters which levels are masked, not only how many",
        "Sec. 3.1 (implied)",
        "No such control in the paper",
        "static_dynamic_mask",
        _selection_matters,
        "Against a mask of the same rate that is dealt out by chance.",
    ),
    Claim(
        "An epsilon of 0.1 is the best, and worse below and above 0.2",
        "Table A2",
        "SD1.5: 0.05 .2720, 0.1 .2763, 0.2 .2759, 0.3 .2735, 0.4 .2718, 0.5 .2691; pretrained .2699",
        "threshold_clip",
        _small_epsilon_best,
    ),
    Claim(
        "SIPO is above the pretrained model for any epsilon up to 0.4",
        "Table A2",
        "All of SD1.5's but 0.5; all of SDXL's",
        "threshold_clip",
        _epsilon_stays_useful,
    ),
    Claim(
        "A wide clip range is harmful",
        "App. F.1",
        "Larger ratios raise the variance of the gradient",
        "threshold_clip",
        _clip_matters,
        "The clip alone, the mask left at 0.9.",
    ),
    Claim(
        "A loose mask is harmful",
        "App. F.1",
        "Discarding low-signal timesteps stabilises training",
        "threshold_clip",
        _threshold_matters,
        "The mask alone, the clip left at 0.1.",
    ),
    Claim(
        "DPO-C&M is better than Diffusion-DPO",
        "Tables 1, 2",
        "CogVideoX-2B 81.37 against 81.16; SD1.5 average 7.3683 against 7.2758",
        "ablation",
        _ablated("C&M", "DPO"),
        "At the same beta; the paper compares at different ones.",
    ),
    Claim(
        "The importance weight helps on its own",
        "Sec. 3.1, Fig. 3",
        "Plot: importance sampling mitigates the instability",
        "ablation",
        _ablated("weight", "DPO"),
        "Without the mask.",
    ),
    Claim(
        "The mask helps on its own",
        "Sec. 3.1",
        "Plot: Fig. 2",
        "ablation",
        _ablated("dynamic mask", "DPO"),
        "Without the weight.",
    ),
    Claim(
        "The reweighting adds to the mask",
        "Tables 1, 2, Sec. 3.2",
        "SIPO against C&M: 81.53 and 81.37, 7.4150 and 7.3683",
        "ablation",
        lambda result: [*_ablated("SIPO", "dynamic mask")(result), *_ablated("SIPO", "C&M")(result)],
    ),
    Claim(
        "A small beta with SIPO is better than a good beta with Diffusion-DPO",
        "Tables 1, A1",
        "Diffusion-DPO at its own beta 81.16, SIPO at a hundredth of it 81.53",
        "ablation",
        _beta_is_enough,
    ),
    Claim(
        "Learnable weights help: the gradient should flow through w",
        "Sec. 3.2",
        '"learnable importance weights", no ablation',
        "gradient_through_w",
        _gradient_helps,
    ),
    Claim(
        "Pairs that the model could not have drawn have lower importance weights",
        "Sec. 3.1",
        "Stated, not measured",
        "on_off_policy",
        _weights_lower_off_policy,
        "Per held-out pair, over noise levels.",
    ),
    Claim(
        "On such pairs Diffusion-DPO loses accuracy",
        "Fig. 3a",
        "Plot: HPSv2 accuracy of SD1.5 drops on Rapidata's images",
        "on_off_policy",
        _dpo_loses_off_policy,
    ),
    Claim(
        "On such pairs SIPO keeps the model's accuracy",
        "Fig. 3a",
        "Plot: no degradation, and no clear improvement",
        "on_off_policy",
        _sipo_keeps_off_policy,
    ),
    Claim(
        "The mismatch makes training unstable: it is worse on such pairs than on the model's own",
        "Sec. 3.1",
        "One of the two factors of the instability",
        "on_off_policy",
        _off_policy_is_worse,
    ),
    Claim(
        "The overhead of mask and weight is moderate",
        "Limitations, App. G",
        '"moderate", no numbers',
        "overhead",
        _overhead,
    ),
    Claim(
        "In rounds Diffusion-DPO degrades, SIPO is stable or improves, and ends higher",
        "Fig. A1, App. F.2",
        "VBench over 10 rounds; a win rate higher by over 15 % after the last",
        "online",
        _rounds,
        "Five rounds, three seeds: [reports/online](../online/README.md).",
    ),
    Claim(
        "People rank SIPO first",
        "Fig. 7, App. E",
        "First of four in 67 % of 200 prompts, 12 raters",
        reason="No person has rated anything here; `trl-sipo study` is the tool for it.",
    ),
    Claim(
        "SIPO improves FLUX on GenEval, SD1.5 and SDXL on Pick-a-Pic, CogVideoX and Wan on VBench",
        "Tables 1, 2, 3",
        "FLUX overall 0.85 against 0.82; Wan 84.78 against 84.41; the others above",
        reason="Needs the published weights and GPUs; configurations, commands and costs: [real models](real_models.md).",
    ),
)

VIPO_PAPER = (
    Claim(
        "On noisy labels a positive alpha is better than Diffusion-DPO",
        "ViPO, Fig. 4, abstract",
        "Pick-a-Pic V2, SD1.5: GenEval 49.87 (alpha 8) against 43.00; SDXL +2.32",
        "label_noise",
        _positive_alpha_helps,
        "Here noise is labels exchanged by chance; there it is conflicting criteria.",
    ),
    Claim(
        "On noisy labels a negative alpha is worse",
        "ViPO, Fig. 4",
        "Plot without numbers in what we have of it",
        "label_noise",
        _negative_alpha_hurts,
    ),
    Claim(
        "On clean labels no alpha beats Diffusion-DPO",
        "ViPO, abstract",
        "The best configuration on ViPO's data converges to Diffusion-DPO",
        "label_noise",
        _clean_needs_none,
    ),
)
CLAIMS = SIPO_PAPER + VIPO_PAPER
