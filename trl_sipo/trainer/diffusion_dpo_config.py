# SPDX-License-Identifier: Apache-2.0
"""Configuration of Diffusion-DPO."""

from dataclasses import dataclass

from trl_sipo.trainer.base_config import DiffusionPreferenceConfig


@dataclass
class DiffusionDPOConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionDPOTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings."""
