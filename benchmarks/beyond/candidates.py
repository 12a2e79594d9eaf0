# SPDX-License-Identifier: Apache-2.0
"""Small changes of the objective, each a few lines on the trainer's hooks, which may move the frontier or may not.

Each takes a trainer class and gives one; `CANDIDATES` names them. They are experiments: what is worth keeping becomes
a setting of the library, and `reports/beyond/README.md` says what all of them did.
"""

from collections.abc import Callable
from typing import Any

import torch

from trl_sipo.core.importance import clip_log_weight
from trl_sipo.core.objectives.proximal import BOUNDED_KAPPA, proximal_penalty
from trl_sipo.core.transition import rho_squared

#: Where a kappa schedule begins, as a share of `proximal_kappa`, at which it ends.
SCHEDULE_START = 0.2
#: Bound of rho^2 where kappa follows it; its median over the levels is below 1.
MAX_RHO_SQUARED = 4.0
#: Width of the soft trust region, in log w: at the mask's threshold the weight is one half.
SOFT_WIDTH = 0.05
#: The reference moves when so many training pairs in a row, by a running mean, are ranked right with a margin.
SAFE_ACCURACY, SAFE_STEPS = 0.8, 20
#: All of them; with others, the runs of candidates are others.
CONSTANTS = (SCHEDULE_START, MAX_RHO_SQUARED, SOFT_WIDTH, SAFE_ACCURACY, SAFE_STEPS)


def with_kappa_schedule(trainer_class: Any) -> Any:
    """Kappa rises over training, from where the push is strong to where the optimum exists."""

    class KappaSchedule(trainer_class):
        def proximal_term(self, errors: Any, level: Any) -> torch.Tensor:
            """The term with the kappa of this step, (batch,)."""
            done = min(1.0, self.state.global_step / max(1, self.state.max_steps))
            kappa = self.args.proximal_kappa * (SCHEDULE_START + (1 - SCHEDULE_START) * done)
            return proximal_penalty(*errors.distances, beta=self.beta, kappa=kappa)

    return KappaSchedule


def with_kappa_by_level(trainer_class: Any) -> Any:
    """Kappa follows rho^2 of the level, as the divergence of a denoising step does, with its mean as it was.

    It does not fall below the bound where its mean does not.
    """

    class KappaByLevel(trainer_class):
        def proximal_term(self, errors: Any, level: Any) -> torch.Tensor:
            """The term with the kappa of each level, (batch,)."""
            every = self.noise_schedule.level_at(torch.linspace(0.005, 0.995, 100))
            mean = self._rho_squared(every).mean().to(level.timestep.device)
            kappa = self.args.proximal_kappa
            floor = BOUNDED_KAPPA if kappa >= BOUNDED_KAPPA else 0.0
            kappa = (kappa * self._rho_squared(level) / mean).clamp(min=floor)
            return proximal_penalty(*errors.distances, beta=self.beta, kappa=kappa)

        def _rho_squared(self, level: Any) -> torch.Tensor:
            previous = self.noise_schedule.previous_level(level, self.args.importance_steps)
            # It grows without bound at the clean end, which alone would then be held.
            return rho_squared(level, previous, self.adapter.prediction_type).clamp(max=MAX_RHO_SQUARED)

    return KappaByLevel


def with_winner_anchor(trainer_class: Any) -> Any:
    """Only the chosen arm is anchored, with the weight of both."""

    class WinnerAnchor(trainer_class):
        def proximal_term(self, errors: Any, level: Any) -> torch.Tensor:
            """`beta * kappa * d_chosen`, (batch,)."""
            return 2 * proximal_penalty(errors.chosen_distance, beta=self.beta, kappa=self.args.proximal_kappa)

    return WinnerAnchor


def with_loser_anchor(trainer_class: Any) -> Any:
    """Only the rejected arm is anchored, with the weight of both: it is the one that is pushed without an end.

    As beta goes to 0, a sample that wins with the chance P has the quadratic factor 2 P - 1 + 4 kappa (1 - P), which
    is not negative for any P from kappa = 1/4 on. There the optimum is twice as far from the reference as with both
    anchors at kappa = 1/2, in the same direction: an extrapolation, and no longer the noise of one distribution.
    """

    class LoserAnchor(trainer_class):
        def proximal_term(self, errors: Any, level: Any) -> torch.Tensor:
            """`beta * kappa * d_rejected`, (batch,)."""
            return 2 * proximal_penalty(errors.rejected_distance, beta=self.beta, kappa=self.args.proximal_kappa)

    return LoserAnchor


def with_moving_reference(trainer_class: Any) -> Any:
    """The reference becomes the policy when the pairs are safely ranked right: the next optimum starts from there."""

    class MovingReference(trainer_class):
        safe_accuracy, safe_steps = 0.5, 0

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            """The step; then the reference, if it is time."""
            loss = super().training_step(*args, **kwargs)
            self.safe_steps += 1
            if self.safe_accuracy >= SAFE_ACCURACY and self.safe_steps >= SAFE_STEPS:
                self.reference.ref_model.load_state_dict(self.unwrapped_model.state_dict())
                self.safe_accuracy, self.safe_steps = 0.5, 0
            return loss

        def pair_loss(self, errors: Any, level: Any, label: Any = None) -> Any:
            """The loss, and a running mean of the share of pairs that are ranked right."""
            loss, statistics = super().pair_loss(errors, level, label)
            if self.model.training:
                accuracy = statistics["rewards/accuracies"].mean().item()
                self.safe_accuracy = 0.9 * self.safe_accuracy + 0.1 * accuracy
            return loss, statistics

    return MovingReference


def with_soft_trust_region(trainer_class: Any) -> Any:
    """SIPO's hard mask made smooth: no pair is dropped at once, and none comes back to full weight at once."""

    class SoftTrustRegion(trainer_class):
        def clip_importance_weights(self, pair_log_weight: torch.Tensor) -> torch.Tensor:
            """Clipped as ever; and what the mask would have decided is kept for the loss, (batch,)."""
            threshold = torch.tensor(self.args.lowest_weight).log()
            self._softness = ((pair_log_weight - threshold) / SOFT_WIDTH).sigmoid().detach()
            return clip_log_weight(-pair_log_weight, self.clip_range).exp()

        def mask_timesteps(self, pair_log_weight: torch.Tensor) -> torch.Tensor:
            """All but the levels on which w is not defined, (batch,) bool."""
            return pair_log_weight.isfinite()

        def compute_pair_loss(self, logit: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            """SIPO's loss times the softness, (batch,)."""
            return self._softness * super().compute_pair_loss(logit, weight, keep)

    return SoftTrustRegion


CANDIDATES: dict[str, Callable[[Any], Any]] = {
    "kappa_schedule": with_kappa_schedule,
    "kappa_by_level": with_kappa_by_level,
    "winner_anchor": with_winner_anchor,
    "loser_anchor": with_loser_anchor,
    "moving_reference": with_moving_reference,
    "soft_trust_region": with_soft_trust_region,
}
