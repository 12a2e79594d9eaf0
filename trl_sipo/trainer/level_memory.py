# SPDX-License-Identifier: Apache-2.0
"""Which noise levels the mask dropped at the last visit, so that they can be drawn anew: a masked pair costs its
forward passes and gives nothing.

The memory divides the schedule into parts and keeps one number for each: the mean importance weight of the pairs that
the last optimiser step had there. With m the share of draws that fall into masked parts and R redraws, a level of a
part that is not masked is trained (1 - m^(R+1)) / (1 - m) times as often as without, one of a masked part m^R times.
That is a bias: the mean gradient of a batch grows by the first factor, and what is masked is looked at less.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
from trl_sipo.trainer import json_checks as checks
from trl_sipo.trainer.checkpoint_reading import read_json

logger = logging.getLogger(__name__)

# Parts of the schedule: of 20 timesteps each in a schedule of 1000, the stride of a sampler of 50 steps.
NUM_PARTS = 50
LEVEL_MEMORY_FILE = "level_memory.json"
_WEIGHTS = checks.items(checks.number(0.0, torch.finfo(torch.float32).max), NUM_PARTS, NUM_PARTS)

SampleLevels = Callable[[list[torch.Generator]], NoiseLevel]
"""One generator per pair -> levels (batch,)."""


def part_of(level: NoiseLevel, schedule: VPSchedule | FlowSchedule) -> torch.Tensor:
    """Which of `NUM_PARTS` equal parts of the schedule's timesteps a level lies in, (batch,) int64."""
    end = schedule.num_train_timesteps if isinstance(schedule, VPSchedule) else schedule.timestep_scale
    return (level.timestep * NUM_PARTS / end).long().clamp(0, NUM_PARTS - 1)


class LevelMemory:
    """Draws noise levels, and those again whose part was masked when a step was last there.

    A visit is an optimiser step of all processes, whatever the micro-batches, so that draws do not depend on how a
    batch is divided. All is done on the device of the levels: no step waits for it.

    Args:
        schedule: The noise process.
        mask: From log weights (n,) to those that are kept, (n,) bool.
        num_redraws: Times that a masked level is drawn anew; 0 remembers nothing.
        gather: Joins a tensor (batch, ...) over all processes.
    """

    def __init__(
        self,
        schedule: VPSchedule | FlowSchedule,
        mask: Callable[[torch.Tensor], torch.Tensor],
        num_redraws: int,
        gather: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ):
        self.schedule = schedule
        self.mask = mask
        self.num_redraws = num_redraws
        self.gather = gather
        self.weight = torch.ones(NUM_PARTS, device=device)  # not visited yet: kept
        self._in_step: list[torch.Tensor] = []

    @property
    def is_masked(self) -> torch.Tensor:
        """Which parts were masked at their last visit, (NUM_PARTS,) bool."""
        return ~self.mask(self.weight.log())

    def draw(self, sample: SampleLevels, generators: list[torch.Generator]) -> NoiseLevel:
        """Levels (batch,): the first of `1 + num_redraws` draws that is not masked, or else the last.

        Every pair makes all its draws, needed or not, so that what follows from its generator is the same.
        """
        level = sample(generators)
        for _ in range(self.num_redraws):
            level = _choose(self.is_masked[part_of(level, self.schedule)], sample(generators), level)
        return level

    def record(self, level: NoiseLevel, weight: torch.Tensor, *, ends_step: bool) -> dict[str, torch.Tensor]:
        """Remember a micro-batch, and return what is logged about the memory.

        Args:
            level: Of the pairs, (batch,).
            weight: Their importance weights, (batch,) float32 in [0, 1]; NaN for those that say nothing.
            ends_step: Whether it is the last one before the optimiser's step.

        Returns:
            Nothing without redraws; else `sipo/masked_levels`, the share of parts that are masked, as (batch,).
        """
        if not self.num_redraws:
            return {}
        share = self.is_masked.float().mean().expand(len(weight))
        self._in_step.append(self.gather(torch.stack([part_of(level, self.schedule).to(weight), weight], dim=1)))
        if ends_step:
            part, weight = torch.cat(self._in_step).unbind(dim=1)
            self.weight = latest_weights(self.weight, part.long(), weight)
            self._in_step.clear()
        return {"sipo/masked_levels": share}

    def begin(self) -> None:
        """Forget the micro-batches of a step in which an earlier run was interrupted."""
        self._in_step.clear()

    def save(self, checkpoint: Path) -> None:
        """Write the memory into a checkpoint, if there is one."""
        if self.num_redraws:
            (checkpoint / LEVEL_MEMORY_FILE).write_text(json.dumps(self.weight.tolist()), encoding="utf-8")

    def load(self, checkpoint: str) -> None:
        """Go on with the memory of a checkpoint; with none, and a warning, when it has none.

        Raises:
            ConfigurationError: It is damaged.
        """
        file = Path(checkpoint, LEVEL_MEMORY_FILE)
        if not self.num_redraws:
            return
        if file.is_file():
            self.weight = torch.tensor(read_json(file, _WEIGHTS), device=self.weight.device)
            return
        logger.warning(
            "The checkpoint %s was written without `mask_redraws`: which noise levels are masked is learned anew.",
            checkpoint,
        )


def latest_weights(known: torch.Tensor, part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mean weight of the pairs of each part, (NUM_PARTS,); what was known where there are none.

    Args:
        known: (NUM_PARTS,).
        part, weight: Of the pairs of a step, (pairs,); one with a weight of NaN does not count.
    """
    says_something = weight.isfinite()
    weight = torch.where(says_something, weight, 0.0)
    # A product with a one-hot matrix: unlike an indexed sum, it is the same in every run on a GPU.
    is_there = part[:, None] == torch.arange(len(known), device=part.device)
    is_there = (is_there & says_something[:, None]).to(weight)
    count = is_there.sum(0)
    return torch.where(count > 0, (is_there * weight[:, None]).sum(0) / count.clamp(min=1), known)


def _choose(condition: torch.Tensor, level: NoiseLevel, other: NoiseLevel) -> NoiseLevel:
    names = ("alpha_t", "sigma_t", "timestep")
    return NoiseLevel(*(torch.where(condition, getattr(level, name), getattr(other, name)) for name in names))
