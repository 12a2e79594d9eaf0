# SPDX-License-Identifier: Apache-2.0
"""D3PO: preferences between the steps that a sampler took."""

import textwrap
from dataclasses import replace
from functools import cached_property

import torch

from trl_sipo.adapters.guidance import Guided
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.objectives._preference_nll import preference_logit, preference_nll
from trl_sipo.core.trajectory import implied_sample
from trl_sipo.core.transition import rho_squared
from trl_sipo.generation.trajectories import check_is_stochastic
from trl_sipo.trainer.arms import NoisedArm, noised_arm
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.diffusion_d3po_config import DiffusionD3POConfig
from trl_sipo.trainer.encoding import EncodedPairs, PairNoise
from trl_sipo.trainer.statistics import PairErrors, error_statistics, logit_statistics


class DiffusionD3POTrainer(DiffusionPreferenceTrainer):
    """D3PO (Yang et al. 2024): `-logsigmoid(beta * (chosen_logratio - rejected_logratio))` of steps of a sampler.

    The log-ratio of a step is that of its probabilities under policy and reference, per latent dimension. A step is
    trained as an image is: what it ended at is the mean for a certain clean image and noise, which take the place of
    the image and of random noise, and the error is then, times rho^2, the squared distance from the policy's mean in
    units of the variance. See [`DiffusionPreferenceTrainer`] for the arguments; the rows are those of
    `trl_sipo.generation.trajectories`.
    """

    _name = "D3PO"
    _tag_names = [*DiffusionPreferenceTrainer._tag_names, "d3po"]
    _paper = {
        "title": "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
        "id": "2311.13231",
        "citation": textwrap.dedent("""\
            @inproceedings{yang2024using,
                title     = {{Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model}},
                author    = {Yang, Kai and Tao, Jian and Lyu, Jiafei and Ge, Chunjiang and Chen, Jiaxin and Shen, Weihan and Zhu, Xiaolong and Li, Xiu},
                booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
                year      = {2024},
            }"""),  # noqa: E501
    }
    config_class = DiffusionD3POConfig

    @cached_property
    def predictor(self) -> Guided:
        """Policy and reference with the guidance of the sampler."""
        return Guided(self.adapter, self.args.guidance_scale)

    def draw_noise(self, pairs: EncodedPairs, generators: list[torch.Generator], *, share: bool) -> PairNoise:
        """None: it is in the trajectories."""
        return tuple(latents.new_empty(len(latents), 0) for latents in pairs.arms)

    def noised_arms(self, pairs: EncodedPairs, level: NoiseLevel, noise: PairNoise) -> list[NoisedArm]:
        """Of both arms the state at the pairs' levels; the target is what a model predicts whose mean is the next."""
        grid = torch.tensor(self.args.timesteps, device=level.timestep.device)
        step = (level.timestep[:, None] == grid).int().argmax(1)
        next_level = self.noise_schedule.previous_level(level, self.args.trajectory_steps)
        rows, extra = torch.arange(len(step), device=step.device), self._extra(pairs)
        arms = []
        for states in pairs.arms:
            clean, implied_noise = implied_sample(states[rows, step], states[rows, step + 1], level, next_level)
            prediction_type = self.adapter.prediction_type
            arms.append(noised_arm(clean, implied_noise, level, pairs.conditioning, extra, prediction_type))
        return arms

    def pair_errors(
        self,
        model: torch.nn.Module,
        pairs: EncodedPairs,
        level: NoiseLevel,
        noise: PairNoise,
        ref_errors: tuple[torch.Tensor, ...] | None = None,
        ref_predictions: tuple[torch.Tensor, ...] | None = None,
    ) -> PairErrors:
        """Squared distances of the steps from the means of policy and reference, over their variance."""
        errors = super().pair_errors(model, pairs, level, noise, ref_errors, ref_predictions)
        next_level = self.noise_schedule.previous_level(level, self.args.trajectory_steps)
        scale = rho_squared(level, next_level, self.adapter.prediction_type)
        return replace(errors, **{name: scale * error for name, error in errors.named().items()})

    def pair_loss(
        self, errors: PairErrors, level: NoiseLevel, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """-logsigmoid(logit), with label smoothing, (batch,), and the statistics of the pairs."""
        logit = preference_logit(errors.chosen_logratio, errors.rejected_logratio, self.beta)
        statistics = error_statistics(errors, beta=self.beta) | logit_statistics(logit)
        return preference_nll(logit, label_smoothing=self.args.label_smoothing), statistics

    def _prepare_backbone(self, denoiser: torch.nn.Module) -> None:
        super()._prepare_backbone(denoiser)
        check_is_stochastic(self.adapter, self.noise_schedule)
