# SPDX-License-Identifier: Apache-2.0
"""The claims of the papers, what the papers say in numbers, and what decides each here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import checks
from checks import Result
from rules import Check


@dataclass(frozen=True)
class Claim:
    """One row of the page.

    Attributes:
        text: What is claimed.
        place: Where in the paper.
        paper: Its numbers.
        question: Whose result decides it; empty where nothing here can.
        decide: The checks, from that result; of a claim that cannot be said here, none.
        reason: Why nothing here can decide it, or what to know about the measurement.
    """

    text: str
    place: str
    paper: str
    question: str = ""
    decide: Callable[[Result], Sequence[Check]] = lambda result: ()
    reason: str = ""


SIPO_PAPER = (
    Claim(
        "With a small beta Diffusion-DPO falls far below the pretrained model",
        "Fig. 1a, 8c, Sec. 4.3",
        "Plot without numbers: far below the baseline at the smallest beta, peak at beta 1 (1000 in this library)",
        "beta_sensitivity",
        checks.small_beta_fails,
        "2 is a tenth of the smallest beta of the paper, 20 is that one.",
    ),
    Claim(
        "SIPO varies less over three decades of beta",
        "Fig. 8c, Sec. 4.3",
        "Plot: only minor variation from 0.02 to 10 (20 to 10000 here)",
        "beta_sensitivity",
        checks.range_is_smaller,
        "Three decades as in the paper, but from 2 on; then the two of them that the paper has too.",
    ),
    Claim(
        "SIPO is above the pretrained model at every beta",
        "Sec. 4.3",
        '"consistently outperforming the baseline", also at 0.02',
        "beta_sensitivity",
        checks.sipo_above_base,
    ),
    Claim(
        "At a good beta both methods are better than the pretrained model",
        "Tables 1, 2",
        "CogVideoX-2B: 81.16 and 81.53 against 80.91; SD1.5 average: 7.2758 and 7.4150 against 7.0133",
        "beta_sensitivity",
        checks.best_above_base,
        "Beta is chosen by the first verifier, the claim checked by the second; on the same images, which flatters.",
    ),
    Claim(
        "At the best beta of each, SIPO is better than Diffusion-DPO",
        "Tables 1, 2",
        "SD1.5: HPS 0.2763 against 0.2753, PickScore 22.01 against 21.89; CogVideoX-2B: 81.53 against 81.16",
        "beta_sensitivity",
        checks.sipo_best_above,
        "Beta is chosen by the first verifier, the claim checked by the second and by distance; on the same images.",
    ),
    Claim(
        "Diffusion-DPO gains at first",
        "Table 1, 500 steps",
        "VBench 81.16 against 80.91 of the pretrained CogVideoX-2B",
        "long_training",
        checks.gains_first,
    ),
    Claim(
        "Diffusion-DPO collapses in longer training",
        "Table 1, 1000 steps; Fig. 1c, 8a, 8b",
        "VBench 67.28 against 80.91 and 81.16",
        "long_training",
        checks.collapses,
        "At a small beta, and at that of Table A1 for video (2, which is 2000 here).",
    ),
    Claim(
        "DPO-C&M and SIPO stay above the pretrained model and go on improving",
        "Table 1, 1000 steps",
        "C&M 81.37 then 81.46, SIPO 81.53 then 81.68; pretrained 80.91",
        "long_training",
        checks.holds_late,
        "Improving: not less accurate, and closer to real photographs, than earlier. The paper's beta is 20 here.",
    ),
    Claim(
        "In longer training SIPO is better than DPO-C&M, and than Diffusion-DPO at its own beta",
        "Table 1, 1000 steps, Table A1",
        "81.68 against 81.46 and 67.28; Diffusion-DPO at a beta of 2 (2000 here), the others at 0.02 (20)",
        "long_training",
        checks.sipo_above_others,
    ),
    Claim(
        "Diffusion-DPO's training loss rises late, SIPO's falls smoothly",
        "Fig. 1b",
        "Plot without numbers",
        "long_training",
        checks.loss_rebounds,
        "A masked pair counts as a loss of zero, so that SIPO's falls as the mask closes, whatever is learned.",
    ),
    Claim(
        "w(t) rises with t, and is below 0.9 on t of 0 to 63",
        "Fig. 4, Sec. 3.1",
        "w < 0.9 for t <= 63 (SD1.5 on Pick-a-Pic)",
        "on_off_policy",
        checks.weight_rises,
        "The base model, by forward passes, on a grid of 50 steps. The paper does not say its own.",
    ),
    Claim(
        "A static mask of the cleanest levels widens the margin, while both rewards still fall",
        "Fig. 2b, Sec. 3.1",
        "Plot: training on t of 60 to 1000",
        "static_dynamic_mask",
        checks.static_widens,
        "From 60: the paper's. From 360: where w of the base model is below 0.9 on the grid of these runs.",
    ),
    Claim(
        "A static mask stabilises training",
        "Fig. 2b, Sec. 3.1",
        '"discarding timesteps with low importance weights improves the stability"',
        "static_dynamic_mask",
        checks.static_helps,
        "Stability is read as accuracy at the end.",
    ),
    Claim(
        "With the dynamic mask the winner's reward rises, the loser's falls, and the margin widens",
        "Fig. 2c, Sec. 3.1",
        "Plot",
        "static_dynamic_mask",
        checks.dynamic_raises_winner,
        "Rewards of held-out pairs.",
    ),
    Claim(
        "The dynamic mask is better than the static one, and than none",
        "Sec. 3.1",
        "Plot: more stable rewards",
        "static_dynamic_mask",
        checks.dynamic_better,
        "Stability is read as accuracy at the end. The dynamic mask leaves out ever more, as the figure shows.",
    ),
    Claim(
        "It matters which levels are masked, not only how many",
        "Sec. 3.1 (implied)",
        "No such control in the paper",
        "static_dynamic_mask",
        checks.selection_matters,
        "Against a mask that keeps as many of each batch as its own weights would, but dealt out by chance.",
    ),
    Claim(
        "An epsilon of 0.1 is the best, and worse below and above 0.2",
        "Table A2",
        "SD1.5: 0.05 .2720, 0.1 .2763, 0.2 .2759, 0.3 .2735, 0.4 .2718, 0.5 .2691; pretrained .2699",
        "threshold_clip",
        checks.small_epsilon_best,
        "0.2 is left out, which the paper calls close.",
    ),
    Claim(
        "SIPO is above the pretrained model for any epsilon up to 0.4",
        "Table A2",
        "All of SD1.5's but 0.5; all of SDXL's",
        "threshold_clip",
        checks.epsilon_stays_useful,
    ),
    Claim(
        "A wide clip range is harmful",
        "App. F.1",
        "Larger ratios raise the variance of the gradient",
        "threshold_clip",
        checks.clip_matters,
        "The clip alone, the mask at 0.5; below a mask at 0.9 no weight goes beyond 1.11.",
    ),
    Claim(
        "A loose mask is harmful",
        "App. F.1",
        "Discarding low-signal timesteps stabilises training",
        "threshold_clip",
        checks.threshold_matters,
        "The mask alone, the clip left at 0.1.",
    ),
    Claim(
        "DPO-C&M is better than Diffusion-DPO",
        "Tables 1, 2",
        "CogVideoX-2B 81.37 against 81.16; SD1.5 average 7.3683 against 7.2758",
        "ablation",
        checks.c_and_m_helps,
        "At the same beta; the paper compares at different ones.",
    ),
    Claim(
        "SIPO is better than Diffusion-DPO at the same beta",
        "Fig. 8c",
        "Plot, of which we have the words alone: SIPO is more robust to small betas",
        "ablation",
        checks.sipo_helps,
    ),
    Claim(
        "The importance weight helps on its own",
        "Sec. 3.1, Fig. 3",
        "Plot: importance sampling mitigates the instability",
        "ablation",
        checks.weight_alone_helps,
        "Without the mask.",
    ),
    Claim(
        "The mask helps on its own",
        "Sec. 3.1",
        "Plot: Fig. 2",
        "ablation",
        checks.mask_alone_helps,
        "Without the weight.",
    ),
    Claim(
        "The reweighting adds to the mask",
        "Tables 1, 2, Sec. 3.2",
        "SIPO against C&M: 81.53 and 81.37, 7.4150 and 7.3683",
        "ablation",
        checks.weight_adds,
    ),
    Claim(
        "A small beta with SIPO is better than a good beta with Diffusion-DPO",
        "Tables 1, A1",
        "Diffusion-DPO at its own beta 81.16, SIPO at a hundredth of it 81.53",
        "ablation",
        checks.beta_is_enough,
        "A hundredth here too.",
    ),
    Claim(
        "Learnable weights help: the gradient should flow through w",
        "Sec. 3.2",
        '"learnable importance weights", no ablation',
        "gradient_through_w",
        checks.gradient_helps,
    ),
    Claim(
        "Pairs that the model could not have drawn have lower importance weights",
        "Sec. 3.1",
        "Implied, not measured",
        "on_off_policy",
        checks.weights_lower_off_policy,
        "Per held-out pair, over noise levels.",
    ),
    Claim(
        "On such pairs Diffusion-DPO loses accuracy",
        "Fig. 3a",
        "Plot: HPSv2 accuracy of SD1.5 drops on Rapidata's images",
        "on_off_policy",
        checks.dpo_loses_off_policy,
    ),
    Claim(
        "On such pairs SIPO keeps the model's accuracy",
        "Fig. 3a",
        "Plot: no degradation, and no clear improvement",
        "on_off_policy",
        checks.sipo_keeps_off_policy,
    ),
    Claim(
        "The mismatch makes training unstable: it is worse on such pairs than on the model's own",
        "Sec. 3.1",
        "One of the two factors of the instability",
        "on_off_policy",
        checks.off_policy_is_worse,
        "The pairs differ in more than that: photographs are better pictures than what the base model draws.",
    ),
    Claim(
        "The overhead of mask and weight is moderate",
        "Limitations, App. G",
        '"moderate", no numbers',
        "overhead",
        checks.overhead,
    ),
    Claim(
        "In rounds Diffusion-DPO degrades, SIPO is stable or improves, and ends higher",
        "Fig. A1, App. F.2",
        "VBench over 10 rounds; a win rate higher by over 15 % after the last",
        "online",
        checks.rounds,
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
        reason="Needs published weights and GPUs; configurations, commands, costs: [real models](real_models.md).",
    ),
)

VIPO_PAPER = (
    Claim(
        "On noisy labels a positive alpha is better than Diffusion-DPO",
        "ViPO, Fig. 4, abstract",
        "Pick-a-Pic V2, SD1.5: GenEval 49.87 (alpha 8) against 43.00; SDXL +2.32",
        "label_noise",
        checks.positive_alpha_helps,
        "Here noise is labels exchanged by chance; there it is conflicting criteria.",
    ),
    Claim(
        "On noisy labels a negative alpha is worse",
        "ViPO, Fig. 4",
        "Plot without numbers in what we have of it",
        "label_noise",
        checks.negative_alpha_hurts,
    ),
    Claim(
        "On clean labels no alpha beats Diffusion-DPO",
        "ViPO, abstract",
        "The best configuration on ViPO's data converges to Diffusion-DPO",
        "label_noise",
        checks.clean_needs_none,
    ),
)
CLAIMS = SIPO_PAPER + VIPO_PAPER
