# SPDX-License-Identifier: Apache-2.0
"""The settings of importance weights, which SIPO has for diffusion models and for language models alike."""

from dataclasses import dataclass, field

from trl_sipo.core.importance import check_clip_range, check_mask_threshold
from trl_sipo.errors import ConfigurationError


@dataclass
class ImportanceConfig:
    """Clip, mask and weight, as separate switches, so that each can be studied alone; to be mixed in.

    Args:
        clip_range: Weights are clipped to [1 - clip_range, 1 + clip_range]; within (0, 1).
        mask_threshold: Pairs whose importance weight is below this are masked. `None` is `1 - clip_range`.
        mask: Whether to mask at all.
        reweight: Whether to use the clipped weight; `False` leaves it at 1.
        weight_grad: Whether the gradient flows through SIPO's weight.
    """

    clip_range: float = field(
        default=0.1, metadata={"help": "Weights are clipped to [1 - clip_range, 1 + clip_range]; within (0, 1)."}
    )
    mask_threshold: float | None = field(
        default=None,
        metadata={"help": "Pairs with an importance weight below this are masked; 1 - clip_range if not given."},
    )
    mask: bool = field(default=True, metadata={"help": "Whether to mask pairs with a low importance weight."})
    reweight: bool = field(default=True, metadata={"help": "Whether to use the clipped weight; otherwise it is 1."})
    weight_grad: bool = field(default=True, metadata={"help": "Whether the gradient flows through SIPO's weight."})

    @property
    def lowest_weight(self) -> float:
        """The weight below which a pair is masked; 0 masks none."""
        if not self.mask:
            return 0.0
        return 1 - self.clip_range if self.mask_threshold is None else self.mask_threshold

    def check_importance_settings(self) -> None:
        """Raise ConfigurationError where a setting is out of range, or has no effect beside the others."""
        check_clip_range(self.clip_range)
        if self.mask_threshold == 0:
            raise ConfigurationError("`mask_threshold=0` masks nothing. To mask nothing set `mask=False`.")
        if self.mask_threshold is not None:
            check_mask_threshold(self.mask_threshold)
        if not self.mask and self.mask_threshold is not None:
            raise ConfigurationError(
                f"`mask=False` contradicts `mask_threshold={self.mask_threshold}`: remove one of the two."
            )
        if not self.weight_grad and not self.reweight:
            raise ConfigurationError(
                "`weight_grad=False` has no effect with `reweight=False`, whose weight carries no gradient: leave it "
                "out."
            )
