# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DPO, the baseline."""

import textwrap

import torch

from trl_sipo.core.objectives._preference_nll import preference_nll
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.diffusion_dpo_config import DiffusionDPOConfig


class DiffusionDPOTrainer(DiffusionPreferenceTrainer):
    """Diffusion-DPO (Wallace et al. 2024): `-logsigmoid(logit)`.

    See [`DiffusionPreferenceTrainer`] for the arguments.
    """

    _name = "Diffusion-DPO"
    _tag_names = [*DiffusionPreferenceTrainer._tag_names, "diffusion-dpo"]
    _paper = {
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "id": "2311.12908",
        "citation": textwrap.dedent("""\
            @inproceedings{wallace2024diffusion,
                title     = {{Diffusion Model Alignment Using Direct Preference Optimization}},
                author    = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron and Purushwalkam, Senthil and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and Naik, Nikhil},
                booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
                pages     = {8228--8238},
                year      = {2024},
            }"""),  # noqa: E501
    }
    config_class = DiffusionDPOConfig

    def compute_pair_loss(self, logit: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """-logsigmoid(logit), with label smoothing; (batch,)."""
        return preference_nll(logit, label_smoothing=self.args.label_smoothing)
