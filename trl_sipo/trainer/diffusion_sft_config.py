# SPDX-License-Identifier: Apache-2.0
"""Configuration of supervised fine-tuning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from trl_sipo.data.formats import Arms
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.rejected_fields import OF_A_REFERENCE, OF_IMPORTANCE_WEIGHTS, OF_PAIRS, REJECTED_FIELDS


@dataclass
class DiffusionSFTConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionSFTTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings.

    Those of a reference, of beta, and of pairs raise [`ConfigurationError`] when set.
    """

    default_beta: ClassVar[float | None] = None
    arms: ClassVar[Arms] = "chosen"
    has_reference: ClassVar[bool] = False
    rejected_fields: ClassVar[Mapping[str, str]] = {
        **REJECTED_FIELDS,
        **OF_A_REFERENCE,
        **OF_PAIRS,
        **OF_IMPORTANCE_WEIGHTS,
        "beta": "the loss is the denoising error alone",
        "beta_convention": "the loss is the denoising error alone",
        "max_margin_fall": "samples have one arm, and so no margin",
    }
