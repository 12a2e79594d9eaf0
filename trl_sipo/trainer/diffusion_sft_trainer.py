# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: the denoising loss on images that are liked."""

import textwrap

import torch

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.diffusion_sft_config import DiffusionSFTConfig
from trl_sipo.trainer.statistics import PairErrors


class DiffusionSFTTrainer(DiffusionPreferenceTrainer):
    """The loss that diffusion models are pretrained with: the mean squared error of the prediction (Ho et al. 2020).

    On images (`prompt`, `image`; with a `label`, on the liked ones) or on the chosen arm of pairs. There is no
    reference. See [`DiffusionPreferenceTrainer`] for the arguments.
    """

    _name = "SFT"
    _tag_names = [*DiffusionPreferenceTrainer._tag_names, "sft"]
    _paper = {
        "title": "Denoising Diffusion Probabilistic Models",
        "id": "2006.11239",
        "citation": textwrap.dedent("""\
            @inproceedings{ho2020denoising,
                title     = {{Denoising Diffusion Probabilistic Models}},
                author    = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
                booktitle = {Advances in Neural Information Processing Systems},
                year      = {2020},
            }"""),
    }
    config_class = DiffusionSFTConfig
    predictions = metrics_by_level = ("logps/chosen",)

    @property
    def beta_description(self) -> str:
        """None: there is no beta."""
        return ""

    def pair_loss(
        self, errors: PairErrors, level: NoiseLevel, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The error of each image, (batch,)."""
        return errors.chosen, {"logps/chosen": -errors.chosen.detach() / 2}
