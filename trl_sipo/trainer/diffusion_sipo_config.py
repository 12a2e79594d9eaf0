# SPDX-License-Identifier: Apache-2.0
"""Configuration of SIPO and of its simpler form DPO-C&M."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl_sipo.core.importance import check_clip_range, check_mask_threshold
from trl_sipo.core.objectives._preference_nll import check_alpha
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig

SIPO_OBJECTIVES = ("sipo", "dpo_cm")


@dataclass
class DiffusionSIPOConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionSIPOTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings.

    Mask, weight and beta are separate switches, so that each can be studied alone.

    Args:
        objective: `"sipo"` scales the logit by the clipped inverse importance weight (Eq. 18, 19 of the SIPO paper);
            `"dpo_cm"` scales the loss by the clipped weight (Eq. 12, 13).
        clip_range: Weights are clipped to [1 - clip_range, 1 + clip_range]; within (0, 1).
        mask_threshold: Pairs whose importance weight is below this are masked. `None` is `1 - clip_range`.
        mask: Whether to mask at all.
        mask_redraws: Times that a noise level is drawn anew when the pairs of the last step in its part of the
            schedule were masked: masked pairs cost as much as others and give nothing. 0 draws once. Levels are then
            distributed otherwise, and the brake that the mask is gets looser; see `docs/source/sipo.md`.
        reweight: Whether to use the clipped weight; `False` leaves it at 1.
        weight_grad: Whether the gradient flows through SIPO's weight. DPO-C&M's never carries one.
        poly_alpha: Coefficient of Poly-DPO's polynomial term, at least -1; 0 turns it off.
    """

    default_beta: ClassVar[float] = 1000.0

    objective: str = field(default="sipo", metadata={"help": "Which form to train.", "choices": list(SIPO_OBJECTIVES)})
    clip_range: float = field(
        default=0.1, metadata={"help": "Weights are clipped to [1 - clip_range, 1 + clip_range]; within (0, 1)."}
    )
    mask_threshold: float | None = field(
        default=None,
        metadata={"help": "Pairs with an importance weight below this are masked; 1 - clip_range if not given."},
    )
    mask: bool = field(default=True, metadata={"help": "Whether to mask pairs with a low importance weight."})
    mask_redraws: int = field(
        default=0, metadata={"help": "Times that a noise level which was masked at the last visit is drawn anew."}
    )
    reweight: bool = field(default=True, metadata={"help": "Whether to use the clipped weight; otherwise it is 1."})
    weight_grad: bool = field(default=True, metadata={"help": "Whether the gradient flows through SIPO's weight."})
    poly_alpha: float = field(default=0.0, metadata={"help": "Coefficient of Poly-DPO's term, at least -1; 0 is off."})

    def __post_init__(self):
        super().__post_init__()
        check_alpha(self.poly_alpha, name="poly_alpha")
        if self.objective not in SIPO_OBJECTIVES:
            raise ConfigurationError(f"Unknown `objective` {self.objective!r}; known are {list(SIPO_OBJECTIVES)}.")
        check_clip_range(self.clip_range)
        if self.mask_threshold == 0:
            raise ConfigurationError("`mask_threshold=0` masks nothing. To mask nothing set `mask=False`.")
        if self.mask_threshold is not None:
            check_mask_threshold(self.mask_threshold)
        if not self.mask and self.mask_threshold is not None:
            raise ConfigurationError(
                f"`mask=False` contradicts `mask_threshold={self.mask_threshold}`: remove one of the two."
            )
        self._check_redraws()
        if not self.weight_grad and (not self.reweight or self.objective == "dpo_cm"):
            cause = "objective='dpo_cm'" if self.objective == "dpo_cm" else "reweight=False"
            raise ConfigurationError(
                f"`weight_grad=False` has no effect with `{cause}`, whose weight carries no gradient: leave it out."
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
