# SPDX-License-Identifier: Apache-2.0
"""SIPO, and its simpler form DPO-C&M."""

import textwrap

import torch

from trl_sipo.core.importance import clip_log_weight, timestep_mask
from trl_sipo.core.objectives.dpo_cm import masked_weighted_nll
from trl_sipo.core.objectives.sipo import masked_scaled_nll
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.diffusion_sipo_config import DiffusionSIPOConfig

# How the weight enters the objective, and the sign of its exponent: SIPO scales the logit by the inverse weight
# (Eq. 18, 19), DPO-C&M the loss by the weight itself (Eq. 12, 13).
_OBJECTIVES = {"sipo": (masked_scaled_nll, -1), "dpo_cm": (masked_weighted_nll, 1)}

SIPO_PAPER = {
    "title": "SIPO: Stabilized and Improved Preference Optimization for Aligning Diffusion Models",
    "id": "2505.21893",
    "citation": textwrap.dedent("""\
        @misc{yang2025sipo,
            title  = {{SIPO}: Stabilized and Improved Preference Optimization for Aligning Diffusion Models},
            author = {Yang, Xiaomeng and Tan, Zhiyu and Wang, Junyan and Zhou, Zhijian and Li, Hao},
            year   = {2025},
            eprint = {2505.21893},
            archivePrefix = {arXiv},
            note   = {first version under the name SDPO},
        }"""),
}


class DiffusionSIPOTrainer(DiffusionPreferenceTrainer):
    """SIPO (`objective="sipo"`) and DPO-C&M (`objective="dpo_cm"`).

    Each pair and noise level gets an importance weight: how likely the policy finds the true denoising step. Pairs
    below `mask_threshold` are masked; the others are reweighted by the clipped weight. See
    [`DiffusionPreferenceTrainer`] for the arguments.
    """

    _name = "SIPO"
    _tag_names = [*DiffusionPreferenceTrainer._tag_names, "sipo"]
    _paper = SIPO_PAPER
    config_class = DiffusionSIPOConfig

    @property
    def method_name(self) -> str:
        """`SIPO` or `DPO-C&M`."""
        return "SIPO" if self.args.objective == "sipo" else "DPO-C&M"

    @property
    def clip_range(self) -> float:
        """Of the configuration."""
        return self.args.clip_range

    @property
    def mask_redraws(self) -> int:
        """Of the configuration."""
        return self.args.mask_redraws

    def clip_importance_weights(self, pair_log_weight: torch.Tensor) -> torch.Tensor:
        """SIPO: clip(1 / w); DPO-C&M: clip(w); 1 without `reweight`. Clipped in the log domain; (batch,)."""
        if not self.args.reweight:
            return torch.ones_like(pair_log_weight)
        _, sign = _OBJECTIVES[self.args.objective]
        weight = clip_log_weight(sign * pair_log_weight, self.clip_range).exp()
        return weight if self.args.weight_grad else weight.detach()

    def mask_timesteps(self, pair_log_weight: torch.Tensor) -> torch.Tensor:
        """Keep the pairs whose importance weight reaches the threshold; (batch,) bool."""
        return timestep_mask(pair_log_weight, self.args.lowest_weight)

    def compute_pair_loss(self, logit: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """The masked and weighted objective; a pair that is not kept has zero loss and zero gradient; (batch,)."""
        objective, _ = _OBJECTIVES[self.args.objective]
        return objective(logit, keep, weight, alpha=self.args.poly_alpha, label_smoothing=self.args.label_smoothing)
