# SPDX-License-Identifier: Apache-2.0
"""Configuration of MaPO."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from trl_sipo.core.objectives.mapo import check_mapo_settings
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.rejected_fields import OF_A_REFERENCE, OF_IMPORTANCE_WEIGHTS, REJECTED_FIELDS


@dataclass
class DiffusionMaPOConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionMaPOTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings.

    Those of a reference raise [`ConfigurationError`] when set. `beta` is another thing than elsewhere: the weight of
    the margin beside the denoising loss, 0.1 if not given.

    Args:
        snr_value: The constant by which the error is multiplied before its score is taken.
    """

    default_beta: ClassVar[float | None] = 0.1
    has_reference: ClassVar[bool] = False
    rejected_fields: ClassVar[Mapping[str, str]] = {
        **REJECTED_FIELDS,
        **OF_A_REFERENCE,
        **OF_IMPORTANCE_WEIGHTS,
        "beta_convention": "beta is the weight of the margin, and the same in all conventions",
        "label_smoothing": "MaPO has none",
        "soft_labels": "the denoising loss is on the chosen image, which a soft label does not name",
        "sft_weight": "the denoising loss on the chosen image is part of the objective, with weight 1",
    }

    snr_value: float = field(
        default=0.5, metadata={"help": "Constant by which the error is multiplied before its score is taken."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_mapo_settings(self.beta, self.snr_value)
