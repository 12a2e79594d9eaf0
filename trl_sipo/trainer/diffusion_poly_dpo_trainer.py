# SPDX-License-Identifier: Apache-2.0
"""Poly-DPO: Diffusion-DPO whose loss is bent for noisy or over-simple labels."""

import textwrap

import torch

from trl_sipo.core.objectives._preference_nll import preference_nll
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.diffusion_poly_dpo_config import DiffusionPolyDPOConfig


class DiffusionPolyDPOTrainer(DiffusionPreferenceTrainer):
    """Poly-DPO (ViPO): `-logsigmoid(logit) + poly_alpha * sigmoid(-logit)`.

    See [`DiffusionPreferenceTrainer`] for the arguments.
    """

    _name = "Poly-DPO"
    _tag_names = [*DiffusionPreferenceTrainer._tag_names, "poly-dpo"]
    _paper = {
        "title": "ViPO: Visual Preference Optimization at Scale",
        "id": "2604.24953",
        "citation": textwrap.dedent("""\
            @misc{vipo2026,
                title         = {{ViPO: Visual Preference Optimization at Scale}},
                year          = {2026},
                eprint        = {2604.24953},
                archivePrefix = {arXiv},
                note          = {introduces Poly-DPO},
            }"""),
    }
    config_class = DiffusionPolyDPOConfig

    def compute_pair_loss(self, logit: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """The polynomial loss of the logit, with label smoothing; (batch,)."""
        return preference_nll(logit, alpha=self.args.poly_alpha, label_smoothing=self.args.label_smoothing)
