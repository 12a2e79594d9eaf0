# SPDX-License-Identifier: Apache-2.0
"""Diffusion-KTO: from images that are liked or not, without pairs."""

import textwrap

import torch

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.objectives.kto import kto_logit, kto_loss, reference_point
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.diffusion_kto_config import DiffusionKTOConfig
from trl_sipo.trainer.statistics import PairErrors, sample_statistics


class DiffusionKTOTrainer(DiffusionPreferenceTrainer):
    """Diffusion-KTO (Li et al. 2024): `weight * (1 - sigmoid(+-beta * (logratio - reference point)))`.

    On images (`prompt`, `image`, `label`), or on the arms of pairs, each by itself: the chosen one is liked, the
    rejected one is not. The reference point is that of the micro-batches of all processes at a time, so that the loss
    of an image depends on the others. See [`DiffusionPreferenceTrainer`] for the arguments.
    """

    _name = "Diffusion-KTO"
    _tag_names = [*DiffusionPreferenceTrainer._tag_names, "diffusion-kto"]
    _paper = {
        "title": "Aligning Diffusion Models by Optimizing Human Utility",
        "id": "2404.04465",
        "citation": textwrap.dedent("""\
            @inproceedings{li2024aligning,
                title     = {{Aligning Diffusion Models by Optimizing Human Utility}},
                author    = {Li, Shufan and Kallidromitis, Konstantinos and Gokul, Akash and Kato, Yusuke and Kozuka, Kazuki},
                booktitle = {Advances in Neural Information Processing Systems},
                year      = {2024},
            }"""),  # noqa: E501
    }
    config_class = DiffusionKTOConfig

    @property
    def beta_description(self) -> str:
        """What beta means here."""
        return (
            f"beta = {self.beta:g} (utility: sigmoid of beta * (logratio - reference point), logratio = (ref_error - "
            f"error) / 2, errors averaged over all latent dims); in the authors' code, which has no factor 1/2, it "
            f"is {self.beta / 2:g}."
        )

    def pair_loss(
        self, errors: PairErrors, level: NoiseLevel, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each image, (batch,), and its statistics.

        Args:
            label: (batch,), 1 for images that are liked, else 0.
        """
        assert label is not None, "check_inputs sees to it"
        is_desirable = label > 0.5
        point = reference_point(self.accelerator.gather(errors.chosen_logratio.detach()))
        logit = kto_logit(errors.chosen_logratio, is_desirable, point, beta=self.beta)
        weights = {name: getattr(self.args, name) for name in ("desirable_weight", "undesirable_weight")}
        loss = kto_loss(logit, is_desirable, **weights)
        statistics = sample_statistics(errors, logit, is_desirable, beta=self.beta)
        return loss, {**statistics, "kl": point.expand(len(loss))}
