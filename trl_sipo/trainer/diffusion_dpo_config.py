# SPDX-License-Identifier: Apache-2.0
"""Configuration of Diffusion-DPO."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust")


@dataclass
class DiffusionDPOConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionDPOTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings.

    Args:
        loss_type: The loss on the logit, by TRL's names: `"sigmoid"` is Diffusion-DPO, with `label_smoothing` its
            conservative form; `"ipo"` and `"hinge"` end the push at a logit of 1/2 and of 1; `"robust"` is unbiased
            when the share `label_smoothing` of the labels is flipped, and needs it. One only.
    """

    rejected_fields: ClassVar[Mapping[str, str]] = {
        name: way_out for name, way_out in DiffusionPreferenceConfig.rejected_fields.items() if name != "loss_type"
    }

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.loss_type not in [[name] for name in LOSS_TYPES]:
            raise ConfigurationError(
                f"`loss_type={self.loss_type!r}` must be one of {list(LOSS_TYPES)}. Others of TRL's are for language "
                "models or need more than pairs of log-ratios, and several are not combined: for a denoising term "
                "use `sft_weight`."
            )
        super().__post_init__()
        (loss_type,) = self.loss_type
        if loss_type in ("ipo", "hinge") and self.label_smoothing:
            raise ConfigurationError(
                f"`label_smoothing={self.label_smoothing}` has no meaning with `loss_type={loss_type!r}`. Remove it, "
                "or use 'sigmoid' or 'robust'."
            )
        if loss_type == "robust" and not self.label_smoothing:
            raise ConfigurationError(
                "`loss_type='robust'` corrects for the share `label_smoothing` of flipped labels, which is 0: without "
                "it the loss is 'sigmoid'. Set `label_smoothing` within (0, 0.5), or use 'sigmoid'."
            )
