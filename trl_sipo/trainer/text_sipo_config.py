# SPDX-License-Identifier: Apache-2.0
"""Configuration of SIPO for language models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from transformers.utils import is_torch_bf16_gpu_available

from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer._trl_compat import DPOConfig
from trl_sipo.trainer.importance_config import ImportanceConfig
from trl_sipo.trainer.rejected_fields import reject_fields
from trl_sipo.trainer.setting_types import check_types

SAMPLING_POLICIES = ("auto", "recorded", "reference")

# Settings of `DPOConfig` under which the loss would be another one, or that are not offered here; with the way out.
REFUSED_SETTINGS = {
    "loss_type": "SIPO scales the logit of the loss 'sigmoid'; for other losses use trl.DPOTrainer",
    "loss_weights": "there is one loss",
    "label_smoothing": "TRL's label smoothing belongs to its losses 'robust' and 'exo_pair'",
    "discopop_tau": "it belongs to TRL's loss 'discopop'",
    "ld_alpha": "the log-probabilities of SIPO's weight and logit are plain sums",
    "f_divergence_type": "SIPO is defined for the reverse KL",
    "f_alpha_divergence_coef": "SIPO is defined for the reverse KL",
    "use_weighting": "WPO weights the pair too; SIPO's own weight takes its place",
    "padding_free": "TRL does not offer it at present and would only warn",
    "use_liger_kernel": "TRL is about to remove it; set `model_init_kwargs` to {'use_kernels': True}",
}


@dataclass
class SIPOConfig(ImportanceConfig, DPOConfig):
    """Configuration of [`SIPOTrainer`]: a [`trl.DPOConfig`], and the settings of [`ImportanceConfig`].

    Settings of `DPOConfig` that change its loss raise [`ConfigurationError`]; see `REFUSED_SETTINGS`. `bf16`, if not
    given, is on where a GPU has it.

    Args:
        beta: TRL's, 0.1: positive; the logit is `beta * (chosen_logratio - rejected_logratio)` of summed token
            log-probabilities.
        sampling_policy: Whose samples the completions are taken to be, which is what the importance weight is relative
            to. `"recorded"`: of the policy whose log-probabilities are the columns `chosen_logps` and `rejected_logps`
            of the data; `"reference"`: of the reference; `"auto"`: recorded where the data has both columns, else the
            reference.
    """

    rejected_fields: ClassVar[Mapping[str, str]] = REFUSED_SETTINGS

    sampling_policy: str = field(
        default="auto",
        metadata={
            "help": "Whose samples the completions are: of the policy whose log-probabilities the data records, of "
            "the reference, or (auto) recorded where the data has the columns.",
            "choices": list(SAMPLING_POLICIES),
        },
    )

    def __post_init__(self):
        if self.bf16 is None:  # TRL's default ends with an error where no GPU is
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
        check_types(self, DPOConfig)
        reject_fields(self)
        if not 0 < self.beta < math.inf:
            raise ConfigurationError(f"`beta` must be positive and finite, got {self.beta}. TRL's default is 0.1.")
        if self.sampling_policy not in SAMPLING_POLICIES:
            raise ConfigurationError(
                f"Unknown `sampling_policy` {self.sampling_policy!r}; known are {list(SAMPLING_POLICIES)}."
            )
        if self.sync_ref_model and self.sampling_policy != "recorded":
            raise ConfigurationError(
                f"`sync_ref_model=True` moves the reference, so that it cannot stand for the policy that wrote the "
                f"completions, as `sampling_policy={self.sampling_policy!r}` may have it. Set "
                "`sampling_policy='recorded'` and give its log-probabilities, or leave the reference where it is."
            )
        self.check_importance_settings()
