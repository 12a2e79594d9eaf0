# SPDX-License-Identifier: Apache-2.0
"""MaPO: preferences without a reference."""

import textwrap

import torch

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.objectives.mapo import mapo_logit, mapo_loss, mapo_score
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.diffusion_mapo_config import DiffusionMaPOConfig
from trl_sipo.trainer.statistics import PairErrors, logit_statistics


class DiffusionMaPOTrainer(DiffusionPreferenceTrainer):
    """MaPO (Hong et al. 2024): `chosen_error - beta * logsigmoid(T * (chosen_score - rejected_score))`.

    There is no reference: no second model, and no pass with the adapter off. See [`DiffusionPreferenceTrainer`] for
    the arguments.
    """

    _name = "MaPO"
    _tag_names = [*DiffusionPreferenceTrainer._tag_names, "mapo"]
    _paper = {
        "title": "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
        "id": "2406.06424",
        "citation": textwrap.dedent("""\
            @misc{hong2024margin,
                title         = {{Margin-aware Preference Optimization for Aligning Diffusion Models without Reference}},
                author        = {Hong, Jiwoo and Paul, Sayak and Lee, Noah and Rasul, Kashif and Thorne, James and Jeong, Jongheon},
                year          = {2024},
                eprint        = {2406.06424},
                archivePrefix = {arXiv},
            }"""),  # noqa: E501
    }
    config_class = DiffusionMaPOConfig

    @property
    def num_timesteps(self) -> int:
        """T: of the noise schedule; of flow models, whose time is continuous, 1000."""
        return getattr(self.noise_schedule, "num_train_timesteps", 1000)

    @property
    def beta_description(self) -> str:
        """What beta means here."""
        return (
            f"beta = {self.beta:g} (MaPO: the weight of the margin beside the denoising loss of the chosen image, "
            "which has weight 1)."
        )

    def pair_loss(
        self, errors: PairErrors, level: NoiseLevel, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each pair, (batch,), and its statistics; rewards are T times the scores."""
        options = {"snr_value": self.args.snr_value, "num_timesteps": self.num_timesteps}
        arms = (errors.chosen, errors.rejected)
        chosen, rejected = (self.num_timesteps * mapo_score(error, self.args.snr_value).detach() for error in arms)
        statistics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            **logit_statistics(mapo_logit(*arms, **options)),
            "logps/chosen": -errors.chosen.detach() / 2,
            "logps/rejected": -errors.rejected.detach() / 2,
        }
        return mapo_loss(*arms, beta=self.beta, **options), statistics
