# SPDX-License-Identifier: Apache-2.0
"""Configuration of Diffusion-KTO."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from trl_sipo.core.objectives.kto import check_weight
from trl_sipo.data.formats import Arms
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.rejected_fields import OF_IMPORTANCE_WEIGHTS, OF_PAIRS, REJECTED_FIELDS

_NOT_PRECOMPUTED = "stored errors are those of pairs; the reference is computed in each step"


@dataclass
class DiffusionKTOConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionKTOTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings.

    Those that only pairs have raise [`ConfigurationError`] when set.

    Args:
        desirable_weight: Weight of the losses of images that are liked.
        undesirable_weight: Weight of the losses of the others.
    """

    default_beta: ClassVar[float | None] = 2000.0
    arms: ClassVar[Arms] = "each"
    rejected_fields: ClassVar[Mapping[str, str]] = {
        **REJECTED_FIELDS,
        **OF_PAIRS,
        **OF_IMPORTANCE_WEIGHTS,
        "precompute_ref_log_probs": _NOT_PRECOMPUTED,
        "precompute_ref_batch_size": _NOT_PRECOMPUTED,
        "num_ref_draws": _NOT_PRECOMPUTED,
        "precompute_ref_predictions": _NOT_PRECOMPUTED,
    }

    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of the losses of images that are liked."})
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of the losses of images that are not liked."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_weight(self.desirable_weight, name="desirable_weight")
        check_weight(self.undesirable_weight, name="undesirable_weight")
