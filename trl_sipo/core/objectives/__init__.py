# SPDX-License-Identifier: Apache-2.0
"""Preference objectives: `(batch,)` tensors in, the unreduced per-pair loss `(batch,)` out."""

from trl_sipo.core.objectives.diffusion_dpo import diffusion_dpo_loss
from trl_sipo.core.objectives.dpo_cm import dpo_cm_loss
from trl_sipo.core.objectives.kto import kto_loss
from trl_sipo.core.objectives.loss_types import hinge_loss, ipo_loss, robust_loss
from trl_sipo.core.objectives.mapo import mapo_loss
from trl_sipo.core.objectives.poly_dpo import poly_dpo_loss
from trl_sipo.core.objectives.proximal import kappa_for_win_rate, optimal_win_rate, proximal_penalty
from trl_sipo.core.objectives.sipo import sipo_loss
from trl_sipo.core.objectives.soft_label import soft_label_loss

__all__ = [
    "diffusion_dpo_loss",
    "dpo_cm_loss",
    "hinge_loss",
    "ipo_loss",
    "kappa_for_win_rate",
    "kto_loss",
    "mapo_loss",
    "optimal_win_rate",
    "poly_dpo_loss",
    "proximal_penalty",
    "robust_loss",
    "sipo_loss",
    "soft_label_loss",
]
