# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DPO, the baseline, and other losses on its logit."""

import textwrap
from collections.abc import Callable
from functools import partial

import torch

from trl_sipo.core.objectives._preference_nll import preference_nll
from trl_sipo.core.objectives.loss_types import hinge_loss, ipo_loss, robust_loss
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.diffusion_dpo_config import DiffusionDPOConfig


class DiffusionDPOTrainer(DiffusionPreferenceTrainer):
    """Diffusion-DPO (Wallace et al. 2024): `-logsigmoid(logit)`, or the loss that `loss_type` names.

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

    @property
    def method_name(self) -> str:
        """`Diffusion-DPO`, and the loss where it is another one."""
        (loss_type,) = self.args.loss_type
        return self._name if loss_type == "sigmoid" else f"{self._name} ({loss_type} loss)"

    def compute_pair_loss(self, logit: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """-logsigmoid(logit), with label smoothing, or the loss of `loss_type`; (batch,)."""
        losses: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "sigmoid": partial(preference_nll, label_smoothing=self.args.label_smoothing),
            "ipo": ipo_loss,
            "hinge": hinge_loss,
            "robust": partial(robust_loss, label_smoothing=self.args.label_smoothing),
        }
        return losses[self.args.loss_type[0]](logit)
