# SPDX-License-Identifier: Apache-2.0
"""Configuration of D3PO."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets

from trl_sipo.core.trajectory import trajectory_timesteps
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.rejected_fields import OF_IMPORTANCE_WEIGHTS, REJECTED_FIELDS

_OF_THE_STEPS = "the levels are those of the steps that were recorded"
_COLUMNS = ("prompt", "chosen_latents", "rejected_latents", "timesteps")


@dataclass
class DiffusionD3POConfig(DiffusionPreferenceConfig):
    """Configuration of [`DiffusionD3POTrainer`]. See [`DiffusionPreferenceConfig`] for the shared settings.

    Noise levels and noise are those of the trajectories; the settings of both raise [`ConfigurationError`] when set.

    Args:
        trajectory_steps: Steps of the sampler that the trajectories were recorded with.
        guidance_scale: Of classifier-free guidance, that they were recorded with; 1 is none. Another one costs two
            passes of policy and reference instead of one.
    """

    default_beta: ClassVar[float | None] = 1000.0
    reads_trajectories: ClassVar[bool] = True
    rejected_fields: ClassVar[Mapping[str, str]] = {
        **REJECTED_FIELDS,
        **OF_IMPORTANCE_WEIGHTS,
        "timesteps": f"{_OF_THE_STEPS}: set `trajectory_steps`",
        "timestep_sampling": _OF_THE_STEPS,
        "timestep_range": _OF_THE_STEPS,
        "timestep_shift": _OF_THE_STEPS,
        "logit_mean": _OF_THE_STEPS,
        "logit_std": _OF_THE_STEPS,
        "eval_noise_levels": "`evaluate()` measures every step that was recorded",
        "eval_noise_seed": "the noise is that of the trajectories",
        "share_noise": "the noise is that of the trajectories",
        "precompute_ref_log_probs": "stored errors are those of images with noise of their own",
        "precompute_ref_batch_size": "stored errors are those of images with noise of their own",
        "num_ref_draws": "stored errors are those of images with noise of their own",
        "precompute_ref_predictions": "stored predictions are those of images with noise of their own",
        "precompute_latents": "trajectories are latents",
        "soft_labels": "D3PO has none",
        "sft_weight": "the steps are those of a sampler, and the chosen ones no image to imitate",
    }

    trajectory_steps: int = field(
        default=20, metadata={"help": "Steps of the sampler that the trajectories were recorded with."}
    )
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance scale that the trajectories were recorded with; 1 is none."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.guidance_scale < float("inf"):
            raise ConfigurationError(f"`guidance_scale` must be 1 (none) or more, got {self.guidance_scale}.")
        # All steps but the last, which is no draw.
        self.timesteps = trajectory_timesteps(self.trajectory_steps)[:-1]

    def latent_shape_of(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of an arm: every state of its trajectory."""
        return (self.trajectory_steps + 1, *latent_shape)

    def check_rows(self, dataset: Any, name: str) -> None:
        """Raise [`DatasetError`] unless the rows are trajectories of this many steps."""
        advice = (
            f"Record trajectories with trl_sipo.generation.trajectories, as rows of {', '.join(_COLUMNS)}, in a "
            "`datasets.Dataset`."
        )
        if isinstance(dataset, PreferenceDataset) and dataset.fmt.holds_latents:
            return  # checked as a dataset of rows
        if not isinstance(dataset, datasets.Dataset) or not set(_COLUMNS) <= set(dataset.column_names):
            found = getattr(dataset, "column_names", type(dataset).__name__)
            raise DatasetError(f"The {name} dataset holds no trajectories, but {found}. {advice}")
        wanted = trajectory_timesteps(self.trajectory_steps)
        for row, timesteps in enumerate(dataset.with_format(None)["timesteps"]):
            if list(timesteps) != wanted:
                raise DatasetError(
                    f"Row {row} of the {name} dataset has the timesteps {list(timesteps)}, but those of a trajectory "
                    f"of `trajectory_steps={self.trajectory_steps}` are {wanted}. Set it to the number of steps that "
                    f"were recorded. {advice}"
                )
