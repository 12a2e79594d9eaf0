# SPDX-License-Identifier: Apache-2.0
"""Configuration of SIPO and of its simpler form DPO-C&M."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl_sipo.core.objectives._preference_nll import check_alpha
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.importance_config import ImportanceConfig

SIPO_OBJECTIVES = ("sipo", "dpo_cm")


@dataclass
class DiffusionSIPOConfig(ImportanceConfig, DiffusionPreferenceConfig):
    """Configuration of [`DiffusionSIPOTrainer`].

    See [`DiffusionPreferenceConfig`] and [`ImportanceConfig`] for the shared settings. `weight_grad` is SIPO's alone:
    the weight of DPO-C&M never carries a gradient.

    Args:
        objective: `"sipo"` scales the logit by the clipped inverse importance weight (Eq. 18, 19 of the SIPO paper);
            `"dpo_cm"` scales the loss by the clipped weight (Eq. 12, 13).
        mask_redraws: Times that a noise level is drawn anew when the pairs of the last step in its part of the
            schedule were masked: masked pairs cost as much as others and give nothing. 0 draws once. Levels are then
            distributed otherwise, and the brake that the mask is gets looser; see `docs/source/sipo.md`.
        poly_alpha: Coefficient of Poly-DPO's polynomial term, at least -1; 0 turns it off.
    """

    default_beta: ClassVar[float] = 1000.0

    objective: str = field(default="sipo", metadata={"help": "Which form to train.", "choices": list(SIPO_OBJECTIVES)})
    mask_redraws: int = field(
        default=0, metadata={"help": "Times that a noise level which was masked at the last visit is drawn anew."}
    )
    poly_alpha: float = field(default=0.0, metadata={"help": "Coefficient of Poly-DPO's term, at least -1; 0 is off."})

    def __post_init__(self):
        super().__post_init__()
        check_alpha(self.poly_alpha, name="poly_alpha")
        if self.objective not in SIPO_OBJECTIVES:
            raise ConfigurationError(f"Unknown `objective` {self.objective!r}; known are {list(SIPO_OBJECTIVES)}.")
        self.check_importance_settings()
        self._check_redraws()
        if not self.weight_grad and self.objective == "dpo_cm":
            raise ConfigurationError(
                "`weight_grad=False` has no effect with `objective='dpo_cm'`, whose weight carries no gradient: leave "
                "it out."
            )

    def _check_redraws(self) -> None:
        if self.mask_redraws < 0:
            raise ConfigurationError(f"`mask_redraws={self.mask_redraws}` must be 0 or more.")
        if not self.mask_redraws:
            return
        if not self.mask:
            raise ConfigurationError(
                f"`mask_redraws={self.mask_redraws}` draws masked levels anew, but `mask=False` masks none: remove "
                "one of the two."
            )
        if self.precompute_ref_log_probs:
            raise ConfigurationError(
                f"`mask_redraws={self.mask_redraws}` contradicts `precompute_ref_log_probs=True`, whose draws of "
                "level and noise are fixed. Remove one of the two."
            )
