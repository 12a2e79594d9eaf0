# SPDX-License-Identifier: Apache-2.0
"""Configuration of Poly-DPO."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl_sipo.core.objectives._preference_nll import check_alpha
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig


@dataclass
class DiffusionPolyDPOConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionPolyDPOTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings.

    Args:
        poly_alpha: Coefficient of the polynomial term, at least -1. Positive for noisy labels (8 is the reported best
            for Stable Diffusion 1.5 on Pick-a-Pic v2), about 0 for clean ones, negative for over-simple data. At a
            fresh model the gradient is (2 + alpha) / 2 times that of Diffusion-DPO.
    """

    default_beta: ClassVar[float] = 1000.0

    poly_alpha: float = field(
        default=8.0, metadata={"help": "Coefficient of the polynomial term, at least -1; positive for noisy labels."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_alpha(self.poly_alpha, name="poly_alpha")
