# SPDX-License-Identifier: Apache-2.0
"""What is logged about a batch of pairs. Names are TRL's where TRL has one; ours are under `sipo/` and `drift/`."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.errors import NumericalError

# Pairs that an error names.
_NAMED_PAIRS = 8

# |logit| beyond which the gradient of the log-sigmoid is below one percent of its largest value, on the winning side.
SATURATED_LOGIT = math.log(99.0)


@dataclass(frozen=True)
class PairErrors:
    """Per-image mean squared errors of policy and reference at one noise level; each (batch,) float32."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor

    @property
    def chosen_logratio(self) -> torch.Tensor:
        """(ref_error - error) / 2 of the chosen images, (batch,)."""
        return (self.ref_chosen - self.chosen) / 2

    @property
    def rejected_logratio(self) -> torch.Tensor:
        """(ref_error - error) / 2 of the rejected images, (batch,)."""
        return (self.ref_rejected - self.rejected) / 2


def pair_statistics(
    errors: PairErrors,
    logit: torch.Tensor,
    log_weight: torch.Tensor,
    weight: torch.Tensor,
    keep: torch.Tensor,
    *,
    beta: float,
    clip_range: float,
) -> dict[str, torch.Tensor]:
    """Statistics of every pair, by the name under which their mean is logged: detached float32 (batch,) tensors.

    Args:
        errors: Of policy and reference.
        logit: beta * (chosen_logratio - rejected_logratio), (batch,).
        log_weight: Log importance weight of the pair, before clipping, (batch,).
        weight: The factor that the objective applies, (batch,).
        keep: Which pairs are not masked, (batch,) bool.
        beta: In the Diffusion-DPO convention.
        clip_range: `sipo/clip_fraction` is the share of weights outside [1 - clip_range, 1 + clip_range].
    """
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    statistics = {
        "rewards/chosen": beta * errors.chosen_logratio,
        "rewards/rejected": beta * errors.rejected_logratio,
        # An exact tie (a fresh model) counts one half.
        "rewards/accuracies": (logit > 0).float() + 0.5 * (logit == 0).float(),
        "rewards/margins": logit,
        "rewards/saturated_fraction": (logit.abs() > SATURATED_LOGIT).float(),
        # Up to terms that do not depend on the model, the log-density of a step per latent dimension.
        "logps/chosen": -errors.chosen / 2,
        "logps/rejected": -errors.rejected / 2,
        "sipo/importance_weight": log_weight.exp(),
        "sipo/weight": weight,
        "sipo/clip_fraction": ((log_weight < low) | (log_weight > high)).float(),
        "sipo/masked_fraction": 1.0 - keep.float(),
        "drift/chosen_error": errors.chosen / errors.ref_chosen - 1,
        "drift/rejected_error": errors.rejected / errors.ref_rejected - 1,
    }
    return {name: value.detach().float() for name, value in statistics.items()}


def not_finite(where: str, pair_index: torch.Tensor, timestep: torch.Tensor, margins: torch.Tensor) -> NumericalError:
    """The error to raise when a margin, and so a prediction error of policy or reference, is NaN or infinite.

    Args:
        where: The step, or the evaluation, as a sentence begins.
        pair_index, timestep, margins: Of all pairs of the batch, (batch,).
    """
    bad = ~torch.isfinite(margins)
    named = [
        f"{pair} (timestep {time:g})"
        for pair, time in zip(pair_index[bad].tolist()[:_NAMED_PAIRS], timestep[bad].tolist(), strict=False)
    ]
    count = int(bad.sum())
    more = f" and {count - _NAMED_PAIRS} more" if count > _NAMED_PAIRS else ""
    return NumericalError(
        f"{where}: the prediction error of policy or reference is not finite for {count} of {len(bad)} pairs: "
        f"pair_index {', '.join(named)}{more}. If the run was healthy until here, the policy has diverged: lower "
        "`learning_rate`, or go back to an earlier checkpoint. With `fp16=True` activations overflow: use "
        "`bf16=True`. If it is always the same few pairs, look at their images or latents."
    )


@dataclass(frozen=True)
class _RecordedStep:
    """One forward pass of training, on its device."""

    means: torch.Tensor
    statistics: dict[str, torch.Tensor]
    pair_index: torch.Tensor
    level: NoiseLevel
    where: str
    ends_step: bool


class MetricsRecorder:
    """Collects the statistics of steps over all processes, for the next log.

    What a step gives stays on its device until [`flush`], so that no step waits for it. On a CPU, where there is
    nothing to wait for, that is at once.

    Args:
        accelerator: Gathers.
        metrics: Lists of values by name, under "train" and "eval"; the log takes their means.
    """

    def __init__(self, accelerator: Accelerator, metrics: dict[str, dict[str, list[float]]]):
        self.accelerator = accelerator
        self.metrics = metrics
        self.is_deferred = accelerator.device.type != "cpu"
        self._pending: list[_RecordedStep] = []
        self._empty_batches = 0
        self._evaluated_pairs: set[int] = set()
        self._masked_in_step: list[bool] = []

    def record_training(
        self, statistics: dict[str, torch.Tensor], pair_index: torch.Tensor, level: NoiseLevel, where: str
    ) -> None:
        """Keep the global batch's means, with one gather for all of them.

        Args:
            statistics: Name to (batch,).
            where: The step, as a sentence begins.

        Raises:
            NumericalError: as [`flush`].
        """
        gathered = self.accelerator.gather(torch.stack(list(statistics.values()), dim=1))
        ends_step = self.accelerator.sync_gradients  # the last part of an accumulated batch
        self._pending.append(_RecordedStep(gathered.mean(0), statistics, pair_index, level, where, ends_step))
        if not self.is_deferred:
            self.flush()

    def flush(self) -> None:
        """Append what is kept to the metrics, with one transfer for all of it.

        Raises:
            NumericalError: An error of policy or reference was not finite; else it would pass for a masked pair.
        """
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        for step, values in zip(steps, torch.stack([step.means for step in steps]).tolist(), strict=True):
            means = dict(zip(step.statistics, values, strict=True))
            if not math.isfinite(means["rewards/margins"]):
                self._raise_not_finite(step.statistics, step.pair_index, step.level, step.where)
            for name, value in means.items():
                self.metrics["train"][name].append(value)
            self._masked_in_step.append(means["sipo/masked_fraction"] == 1.0)
            if step.ends_step:
                self._empty_batches += all(self._masked_in_step)
                self._masked_in_step.clear()
        self.metrics["train"]["sipo/empty_batches"] = [self._empty_batches]

    def record_evaluation(self, statistics: dict[str, torch.Tensor], pair_index: torch.Tensor) -> None:
        """Append every pair's value (each pair once, whatever the batches), so that `log` takes the exact mean."""
        values = self.accelerator.gather_for_metrics(torch.stack(list(statistics.values()), dim=1)).tolist()
        pairs = self.accelerator.gather_for_metrics(pair_index).tolist()
        if not self.metrics["eval"]:  # another evaluation
            self._evaluated_pairs.clear()
        # accelerate takes the pairs that fill up the last batch away again, but not those of a stream.
        new = {pair: row for pair, row in zip(pairs, values, strict=True) if pair not in self._evaluated_pairs}
        self._evaluated_pairs.update(new)
        for name, column in zip(statistics, zip(*new.values(), strict=True), strict=bool(new)):
            self.metrics["eval"][name].extend(column)

    def check_finite(
        self, statistics: dict[str, torch.Tensor], pair_index: torch.Tensor, level: NoiseLevel, where: str
    ) -> None:
        """Raise [`NumericalError`], on all processes, when an error of policy or reference is not finite on one."""
        margins = self.accelerator.gather(statistics["rewards/margins"])
        if not bool(margins.isfinite().all()):
            self._raise_not_finite(statistics, pair_index, level, where)

    def _raise_not_finite(
        self, statistics: dict[str, torch.Tensor], pair_index: torch.Tensor, level: NoiseLevel, where: str
    ) -> None:
        """Every process comes here, since each saw the same gathered values, and names the pairs of all of them."""
        margins = statistics["rewards/margins"]
        parts = [pair_index.to(margins.device), level.timestep.to(margins.device), margins]
        raise not_finite(where, *(self.accelerator.gather(part) for part in parts))
