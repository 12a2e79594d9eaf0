# SPDX-License-Identifier: Apache-2.0
"""From the steps to the next log: the means of the global batch, and the place where numbers that are not finite end.

On a GPU no step waits for the device. The numbers of a micro-batch are on their way to the CPU while the next ones are
computed, and are read two micro-batches later, when they have long arrived.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import torch
from accelerate import Accelerator

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer import json_checks as checks
from trl_sipo.trainer.level_log import LEVEL_SUMS, LevelLog, level_values
from trl_sipo.trainer.noise_levels import times_of, timesteps_of
from trl_sipo.trainer.nonfinite import (
    broken_pairs,
    gradient_message,
    gradient_norms,
    numerical_error,
    pairs_message,
)
from trl_sipo.trainer.reproduction import Fault, ReproductionWriter, StepBatch, bounded
from trl_sipo.trainer.start_check import StartCheck, start_gap
from trl_sipo.trainer.statistics import PairErrors

logger = logging.getLogger(__name__)

# Micro-batches whose numbers may be on their way, while the CPU is ahead of the device.
IN_FLIGHT = 2
# Steps in a row that a gradient scaler may leave out. It halves its scale each time: from 2**16 to below any use.
MAX_OVERFLOWS = 40
# What the state of a recorder must be, and what it is at the start of a run.
RECORDED = checks.record(
    {
        "metrics": checks.table(checks.items(checks.number(is_finite=False))),  # of skipped steps alone, NaN
        "masked_in_step": checks.items(checks.flag()),
        "empty_batches": checks.count(),
        "skipped_steps": checks.count(),
        "overflows": checks.count(),
    },
    {"levels": LEVEL_SUMS},  # of a run that writes them down
)
NOTHING_RECORDED = {"metrics": {}, "masked_in_step": [], "empty_batches": 0, "skipped_steps": 0, "overflows": 0}


class _Transfer:
    """Numbers on their way from their device to the CPU."""

    def __init__(self, values: torch.Tensor):
        self._values = values.detach()
        self._arrived = None
        if values.device.type == "cuda":
            self._values = self._values.to("cpu", non_blocking=True)  # into pinned memory, so that it is queued
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[Any]:
        """The numbers, when they are there, in lists as deep as the tensor."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


@dataclass
class _Recorded:
    """A micro-batch of training, from its forward pass to its place in the metrics.

    Attributes:
        names: Of the statistics whose means come first in `numbers`; the largest values of the checks follow.
        numbers: Of the global batch.
        broken: Of this process, (batch,) on its device; see `first_broken`.
        step: The optimiser step, from 1.
        ends_step: Whether it is the last part of an accumulated batch.
        gradient: Of the whole step, with its last micro-batch: the norm, then the norms by parameter.
        parameters: Their names.
        step_batches: The micro-batches of the step, with its last one.
        levels: What is written down of each pair of the global batch, (pairs, 1 + names): its timestep first.
        level_names: Of what follows.
    """

    names: tuple[str, ...]
    numbers: _Transfer
    broken: torch.Tensor
    batch: StepBatch
    step: int
    ends_step: bool
    gradient: _Transfer | None = None
    parameters: tuple[str, ...] = ()
    step_batches: tuple[StepBatch, ...] = ()
    levels: _Transfer | None = None
    level_names: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The step, as a sentence begins."""
        return f"Step {self.step}"


def make_recorder(trainer: Any, *, starts_at_reference: bool) -> "MetricsRecorder":
    """The recorder of a trainer that is otherwise made.

    Args:
        trainer: A diffusion preference trainer.
        starts_at_reference: Whether its reference is what the policy is before the first step.

    Raises:
        ConfigurationError: The engine takes the optimiser's step itself, so that none can be left out.
    """
    skips = trainer.args.on_nonfinite == "skip"
    if skips and trainer.is_deepspeed_enabled:
        raise ConfigurationError(
            "`on_nonfinite='skip'` cannot leave out a step of DeepSpeed, which takes it within the backward pass. Set "
            "`on_nonfinite='raise'`, or use another engine."
        )
    return MetricsRecorder(
        trainer.accelerator,
        trainer._metrics,
        StartCheck(trainer, starts_at_reference=starts_at_reference),
        ReproductionWriter(trainer),
        trainer.args.max_skipped_steps if skips else None,
        _level_log(trainer) if trainer.args.run_log else None,
    )


def _level_log(trainer: Any) -> LevelLog:
    options = {"schedule": trainer.noise_schedule, "args": trainer.args}
    return LevelLog(partial(times_of, **options), partial(timesteps_of, **options))


class MetricsRecorder:
    """Collects the statistics of steps over all processes, and ends or skips those that are not finite.

    All processes see the same gathered numbers, so that they come to the same conclusion.

    Args:
        accelerator: Gathers.
        metrics: Lists of values by name, under "train" and "eval"; the log takes their means.
        start_check: Looks at the first step that is taken.
        reproduce: Writes what a step was given; returns where.
        max_skipped_steps: Optimiser steps that may be left out in a run; `None`: the first one that is not finite
            raises.
        levels: Is given what is seen of each noise level; `None`: nobody asks for it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        metrics: dict[str, dict[str, list[float]]],
        start_check: StartCheck,
        reproduce: Callable[[Fault], str | None],
        max_skipped_steps: int | None = None,
        levels: LevelLog | None = None,
    ):
        self.accelerator = accelerator
        self.metrics = metrics
        self.start_check = start_check
        self.reproduce = reproduce
        self.max_skipped_steps = max_skipped_steps
        self.levels = levels
        self.is_deferred = accelerator.device.type == "cuda"
        self._pending: list[_Recorded] = []
        self._in_step: list[StepBatch] = []
        self._last: _Recorded | None = None
        self._norms: Mapping[str, torch.Tensor] = {}
        self._empty_batches = 0
        self._skipped_steps = 0
        self._overflows = 0
        self._masked_in_step: list[bool] = []
        self._evaluated_pairs: set[int] = set()
        self._is_counted: list[bool] = []

    # ------------------------------------------------------------------------------------------------- training

    def begin(self, *, is_new: bool) -> None:
        """Forget the step in which an earlier run of this trainer was interrupted.

        Args:
            is_new: Whether nothing was taken up from a checkpoint; then its metrics and counts are forgotten too.
        """
        self._pending, self._in_step, self._last, self._norms = [], [], None, {}
        self.start_check.begin()
        if is_new:
            self.load_state_dict(NOTHING_RECORDED)

    def record_training(
        self,
        loss: torch.Tensor,
        statistics: dict[str, torch.Tensor],
        broken: torch.Tensor,
        batch: StepBatch,
        step: int,
    ) -> None:
        """Keep the global batch's means, with one gather for all of them.

        Args:
            loss: Per pair, (batch,).
            statistics: Name to (batch,).
            broken: (batch,), from `first_broken`.
            batch: What it was computed from.
            step: The optimiser step, from 1.

        Raises:
            NumericalError: as [`flush`].
        """
        if self._last is not None and self._last.ends_step:  # a step begins, whoever took the one before
            self._in_step = []
            self.start_check.end()
        if self.skips:  # else transformers' own mean is logged, NaN included
            statistics = statistics | {"loss": loss.detach().float()}
        checks = [broken, start_gap(batch.errors)] if self.start_check.is_due else [broken]
        values = {} if self.levels is None else level_values(batch.errors, statistics)
        of_levels = [batch.level.timestep.to(broken), *values.values()] if values else []
        columns = [*statistics.values(), *checks, *of_levels]
        gathered = self.accelerator.gather(torch.stack(columns, dim=1))
        averaged, checked, of_levels = gathered.split([len(statistics), len(checks), len(of_levels)], dim=1)
        # NaN stands for what a sample has not: one that is disliked has no reward of a liked one.
        numbers = _Transfer(torch.cat([averaged.nanmean(0), checked.amax(0)]))
        self._last = _Recorded(
            tuple(statistics), numbers, broken, batch, step, ends_step=self.accelerator.sync_gradients
        )
        if values and self.accelerator.is_main_process:  # which writes them down
            self._last.levels, self._last.level_names = _Transfer(of_levels.contiguous()), tuple(values)
        self._in_step = bounded([*self._in_step, batch])
        self._pending.append(self._last)
        if not self.skips:
            self._settle(IN_FLIGHT if self.is_deferred else 0)

    def look_at_gradients(self, model: torch.nn.Module) -> None:
        """Remember which gradients are finite, before clipping makes them all NaN."""
        self._norms = gradient_norms(model)

    def end_step(self, norm: torch.Tensor | float | None) -> bool:
        """Take the norm of the step's gradient; returns whether the optimiser must leave this step out.

        Under a gradient scaler an infinite gradient is its own business: it leaves the step out and lowers the scale.

        Args:
            norm: Of the global gradient; `None` where the engine does not tell.

        Raises:
            NumericalError: The first step, or on a CPU any, is not finite; or too many were left out.
        """
        last, in_step = self._last, self._in_step
        assert last is not None
        self._in_step = []
        if norm is not None:
            norm = getattr(norm, "full_tensor", lambda: norm)()  # of shards
            norm = torch.as_tensor(norm, dtype=torch.float32, device=last.broken.device).view(1)
            norms = [value.float().view(1).to(norm.device) for value in self._norms.values()]
            last.gradient, last.parameters = _Transfer(torch.cat([norm, *norms])), tuple(self._norms)
            last.step_batches = tuple(in_step)
        self._norms = {}
        if self.skips:
            return self._skip_or_keep()
        # The weights of the first step are those that the run was given: nothing may change them before it is checked.
        if not self.is_deferred or self.start_check.is_due:
            self.flush()
            self._check_gradient(last)
        self.start_check.end()
        return False

    def flush(self) -> None:
        """Append what is kept to the metrics, so that they are complete.

        Raises:
            NumericalError: Something was not finite; else it would pass for a masked pair.
            ConfigurationError: The policy does not start at its reference.
        """
        if not self.skips:  # else every step is settled when it ends
            self._settle(0)

    @property
    def skips(self) -> bool:
        """Whether a step that is not finite is left out, instead of ending the run."""
        return self.max_skipped_steps is not None

    def state_dict(self) -> dict[str, Any]:
        """What the next log will be made of, and the counts of the run; of values that JSON can hold."""
        levels = {} if self.levels is None else {"levels": self.levels.training.state_dict()}
        return levels | {
            "metrics": {name: list(values) for name, values in self.metrics["train"].items()},
            "masked_in_step": list(self._masked_in_step),
            "empty_batches": self._empty_batches,
            "skipped_steps": self._skipped_steps,
            "overflows": self._overflows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what [`state_dict`] gave."""
        self.metrics["train"].clear()
        for name, values in state["metrics"].items():
            self.metrics["train"][name] = list(values)
        self._masked_in_step = list(state["masked_in_step"])
        self._empty_batches, self._skipped_steps = state["empty_batches"], state["skipped_steps"]
        self._overflows = state["overflows"]
        if self.levels is not None:
            self.levels.begin_training()
            if "levels" in state:
                self.levels.training.load_state_dict(state["levels"])

    def _settle(self, in_flight: int) -> None:
        while len(self._pending) > in_flight:
            recorded = self._pending.pop(0)
            if (fault := self._fault(recorded)) is not None:
                raise numerical_error(fault.message, self.reproduce(fault))
            self._append(recorded)
            if recorded.gradient is not None:
                self._check_gradient(recorded)

    def _fault(self, recorded: _Recorded) -> Fault | None:
        """What is not finite in the forward pass of a micro-batch, if anything; and the check of the first step."""
        worst_link, *gap = recorded.numbers.wait()[len(recorded.names) :]
        if worst_link == 0:
            if gap:
                self.start_check(gap[0], recorded.where)
            return None
        return self._pairs_fault(recorded.where, recorded.broken, recorded.batch, recorded.step)

    def _check_gradient(self, recorded: _Recorded) -> None:
        """Raise, or where a scaler is at work count, when the gradient of a step is not finite."""
        if (fault := self._gradient_fault(recorded)) is not None:
            raise numerical_error(fault.message, self.reproduce(fault))

    def _gradient_fault(self, recorded: _Recorded) -> Fault | None:
        transfer, recorded.gradient = recorded.gradient, None  # looked at once
        if transfer is None:
            return None
        norm, *norms = transfer.wait()
        if math.isfinite(norm):
            self._overflows = 0
            return None
        if self.accelerator.scaler is not None or self.accelerator.mixed_precision == "fp16":  # DeepSpeed has its own
            self._overflows += 1
            if self._overflows <= MAX_OVERFLOWS:
                return None
        named = zip(recorded.parameters, norms, strict=True)
        parameters = [name for name, value in named if not math.isfinite(value)]
        message = gradient_message(recorded.where, parameters, len(norms))
        batches = recorded.step_batches
        return Fault(message, "gradient", recorded.step, batches, parameters, has_weights=self._has_weights)

    @property
    def _has_weights(self) -> bool:
        """Whether a fault is noticed before the optimiser's step."""
        return self.skips or not self.is_deferred or self.start_check.is_due

    def _append(self, recorded: _Recorded) -> None:
        means = dict(zip(recorded.names, recorded.numbers.wait(), strict=False))
        train = self.metrics["train"]
        if "loss" in means and train["loss"] and math.isnan(train["loss"][0]):
            train["loss"].clear()  # it stood for a log without a step that was kept
        for name, value in means.items():
            if not math.isnan(value):
                train[name].append(value)
        if "sipo/masked_fraction" in means:
            self._count_empty(means["sipo/masked_fraction"], recorded.ends_step)
            train["sipo/empty_batches"] = [self._empty_batches]
        if self.skips:
            train["sipo/skipped_steps"] = [self._skipped_steps]
        if recorded.levels is not None and self.levels is not None:
            self.levels.add_training(recorded.level_names, recorded.levels.wait())

    def _count_empty(self, masked_fraction: float, ends_step: bool) -> None:
        """A batch is empty when every micro-batch of it is masked altogether."""
        self._masked_in_step.append(masked_fraction == 1.0)
        if ends_step:
            self._empty_batches += all(self._masked_in_step)
            self._masked_in_step.clear()

    def _skip_or_keep(self) -> bool:
        """Whether the step that ends is left out. It waits for the device: the optimiser cannot go on without it."""
        recorded, self._pending = self._pending, []
        faults = [self._fault(part) for part in recorded] + [self._gradient_fault(recorded[-1])]
        fault = next(filter(None, faults), None)
        if fault is None:
            self.start_check.end()
            for part in recorded:
                self._append(part)
            return False
        self.start_check.postpone()
        self._last = None  # no step has ended
        self._skipped_steps += 1
        folder, limit = self.reproduce(fault), self.max_skipped_steps
        assert limit is not None
        if self._skipped_steps > limit:
            message = f"{fault.message} {self._skipped_steps} steps were not finite, and `max_skipped_steps={limit}`."
            raise numerical_error(message, folder)
        train = self.metrics["train"]
        train["sipo/skipped_steps"] = [self._skipped_steps]
        train["loss"] = train["loss"] or [math.nan]
        if self.accelerator.is_main_process:
            text = numerical_error(fault.message, folder)
            logger.warning("%s The step is left out (%d of at most %d).", text, self._skipped_steps, limit)
        return True

    # ----------------------------------------------------------------------------------------------- evaluation

    def begin_evaluation(self, prefix: str) -> None:
        """Forget the evaluation before.

        Args:
            prefix: Of the metrics of this one.
        """
        self.metrics["eval"].clear()
        if self.levels is not None:
            self.levels.begin_evaluation(prefix)

    def end_evaluation(self, prefix: str) -> dict[str, float]:
        """The means over all pairs that were recorded, by name, each with the prefix before it."""
        means = {f"{prefix}_{name}": sum(values) / len(values) for name, values in self.metrics["eval"].items()}
        self.metrics["eval"].clear()
        return means

    def record_evaluation(
        self,
        statistics: dict[str, torch.Tensor],
        pair_index: torch.Tensor,
        levels: Mapping[float, NoiseLevel],
        of_levels: Sequence[tuple[PairErrors, Mapping[str, torch.Tensor]]],
    ) -> None:
        """Append every pair's value (each pair once, whatever the batches), so that `log` takes the exact mean.

        NaN, of what a pair has not, is left out.

        Args:
            statistics: Name to (batch,).
            pair_index: (batch,).
            levels: Time to level (1,), of those at which the pairs were measured.
            of_levels: For each of them the errors and statistics of the pairs.
        """
        kept = [] if self.levels is None else [level_values(*measured) for measured in of_levels]
        parts = [value for of_level in kept for value in of_level.values()]
        rows = self.accelerator.gather_for_metrics(torch.stack([*statistics.values(), *parts], dim=1)).tolist()
        pairs = self.accelerator.gather_for_metrics(pair_index).tolist()
        if not self.metrics["eval"]:  # another evaluation
            self._evaluated_pairs.clear()
        # accelerate takes the pairs that fill up the last batch away again, but not those of a stream.
        self._is_counted = []
        for pair in pairs:
            self._is_counted.append(pair not in self._evaluated_pairs)
            self._evaluated_pairs.add(pair)
        new = list(compress(rows, self._is_counted))
        for name, column in zip(statistics, zip(*new, strict=True), strict=False):
            if values := [value for value in column if not math.isnan(value)]:
                self.metrics["eval"][name].extend(values)
        if self.levels is not None and parts and new:
            self.levels.add_evaluation(levels, tuple(kept[0]), [row[len(statistics) :] for row in new])

    def gather_counted(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, of the pairs that the last [`record_evaluation`] counted.

        Args:
            values: (batch, ...), one row per pair.
        """
        gathered = self.accelerator.gather_for_metrics(values)
        if all(self._is_counted) or len(gathered) != len(self._is_counted):  # the loss of a batch has no rows of pairs
            return gathered
        return gathered[torch.tensor(self._is_counted, device=gathered.device)]

    def check_evaluation(self, broken: torch.Tensor, batch: StepBatch) -> None:
        """Raise [`NumericalError`], on all processes, when something is not finite on one.

        Args:
            broken: (batch,), from `first_broken`.
            batch: What it was computed from.
        """
        if bool((self.accelerator.gather(broken) > 0).any()):
            fault = self._pairs_fault("Evaluation", broken, batch, step=0)
            raise numerical_error(fault.message, self.reproduce(fault))

    def _pairs_fault(self, where: str, broken: torch.Tensor, batch: StepBatch, step: int) -> Fault:
        """Every process comes here, since each saw the same gathered values, and names the pairs of all of them."""
        parts = [broken, batch.pair_index.to(broken.device), batch.level.timestep.to(broken.device)]
        named = broken_pairs(*(self.accelerator.gather(part) for part in parts))
        batches = [batch] if bool((broken > 0).any()) else []
        has_weights = step == 0 or self._has_weights
        return Fault(pairs_message(where, named), named.link, step, batches, has_weights=has_weights)
