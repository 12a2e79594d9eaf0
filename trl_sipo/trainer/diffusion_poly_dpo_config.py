# SPDX-License-Identifier: Apache-2.0
"""Configuration of Poly-DPO."""

from dataclasses import dataclass, field

from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig


def check_poly_alpha(poly_alpha: float) -> None:
    """Raise [`ConfigurationError`] for a polynomial coefficient that turns the gradient round."""
    if not -1.0 <= poly_alpha < float("inf"):
        raise ConfigurationError(
            f"`poly_alpha` must be at least -1, got {poly_alpha}: below -1 the gradient changes its sign where the "
            "model is confident. Use a positive value for noisy labels, a negative one for over-simple data, 0 for "
            "Diffusion-DPO."
        )


@dataclass
class DiffusionPolyDPOConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionPolyDPOTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings.

    Args:
        poly_alpha: Coefficient of the polynomial term, at least -1. Positive for noisy labels (8 is the reported best
            for Stable Diffusion 1.5 on Pick-a-Pic v2), about 0 for clean ones, negative for over-simple data. At a
            fresh model the gradient is (2 + alpha) / 2 times that of Diffusion-DPO.
    """

    beta: float = field(
        default=1000.0,
        metadata={
            "help": "Pull to the reference, in the Diffusion-DPO convention (with the 1/2, mean over latent "
            "dimensions). Larger stays closer to the reference."
        },
    )
    poly_alpha: float = field(
        default=8.0, metadata={"help": "Coefficient of the polynomial term, at least -1; positive for noisy labels."}
    )

    def __post_init__(self):
        check_poly_alpha(self.poly_alpha)
        super().__post_init__()
