# SPDX-License-Identifier: Apache-2.0
"""What watches a run: its metrics, and warnings when training goes wrong."""

import logging
from collections import deque
from typing import Any

from transformers import TrainerCallback

from trl_sipo.trainer import json_checks as checks
from trl_sipo.trainer._trl_compat import SyncRefModelCallback
from trl_sipo.trainer.metrics_recorder import RECORDED
from trl_sipo.trainer.run_state import RememberedCallback
from trl_sipo.trainer.sample_grids import SampleGridCallback

logger = logging.getLogger(__name__)

# Consecutive logs over which the winner's error must rise before a warning, and the rise that is worth one.
DRIFT_WINDOW = 5
DRIFT_RISE = 0.05
# Share of masked pairs, and of saturated logits, above which training has all but stopped; and the consecutive logs
# that must show the masked share, since a single small batch is masked altogether by chance.
MASKED_SHARE = 0.99
MASKED_WINDOW = 3
SATURATED_SHARE = 0.5


class MetricsCallback(RememberedCallback):
    """Fetches the metrics of the steps from the device when they are needed: to be logged, or before weights are kept.

    Args:
        recorder: A [`~trl_sipo.trainer.metrics_recorder.MetricsRecorder`].
        level_memory: A [`~trl_sipo.trainer.level_memory.LevelMemory`].
    """

    def __init__(self, recorder: Any, level_memory: Any):
        self.recorder = recorder
        self.level_memory = level_memory

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin with a whole step, whatever an interrupted run has left; what a checkpoint holds is there already."""
        self.recorder.begin(is_new=state.global_step == 0)
        self.level_memory.begin()

    def on_step_end(self, args, state, control, **kwargs):
        """Fetch, if this step is logged, evaluated, saved or the last; errors that are not finite raise here."""
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.recorder.flush()

    def on_epoch_end(self, args, state, control, **kwargs):
        """The same for what is done by epochs."""
        self.on_step_end(args, state, control)

    def state_dict(self) -> dict[str, Any]:
        """What the next log will average."""
        self.recorder.flush()
        return self.recorder.state_dict()

    def check_state(self, state: Any, name: str) -> str | None:
        """The recorder's."""
        return RECORDED(state, name)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self.recorder.load_state_dict(state)


class DivergenceWarningCallback(RememberedCallback):
    """Warns once, with advice, when the winner's error rises steadily, when all is masked, or when logits saturate.

    Reads the keys `drift/chosen_error`, `sipo/masked_fraction`, `sipo/empty_batches` and `rewards/saturated_fraction`
    of the training logs.
    """

    def __init__(self):
        self._drift: deque[float] = deque(maxlen=DRIFT_WINDOW)
        self._masked_logs = 0
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """The last logs; not what was warned of, which whoever reads the log of a resumed run has not seen."""
        return {"drift": list(self._drift), "masked_logs": self._masked_logs}

    def check_state(self, state: Any, name: str) -> str | None:
        """A few logs, and how many were masked."""
        drift = checks.items(checks.number(is_finite=False), high=DRIFT_WINDOW)
        return checks.record({"drift": drift, "masked_logs": checks.count()})(state, name)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        self._drift.extend(state["drift"])
        self._masked_logs = state["masked_logs"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at one training log."""
        if not logs or "drift/chosen_error" not in logs or not state.is_world_process_zero:
            return
        self._drift.append(logs["drift/chosen_error"])
        drift = list(self._drift)
        steps = zip(drift, drift[1:], strict=False)
        rising = len(drift) == DRIFT_WINDOW and all(later > earlier for earlier, later in steps)
        if rising and drift[-1] > DRIFT_RISE:
            self._warn_once(
                "drift",
                f"Step {state.global_step}: the error on the chosen images has risen for {DRIFT_WINDOW} logs and is "
                f"{drift[-1]:.0%} above the reference's. The margin then grows by forgetting, and images degrade. "
                "Lower the learning rate, raise `beta`, stop earlier, or add `sft_weight`; SIPO and DPO-C&M mask such "
                "pairs.",
            )
        self._masked_logs = self._masked_logs + 1 if logs.get("sipo/masked_fraction", 0.0) >= MASKED_SHARE else 0
        if self._masked_logs >= MASKED_WINDOW:
            self._warn_once(
                "masked",
                f"Step {state.global_step}: for {MASKED_WINDOW} logs nearly all pairs have been masked, so training "
                "has all but stopped: a flat curve does not mean that it has converged. The policy has left the data: "
                "go back to an earlier checkpoint, lower the learning rate or raise `beta`; a lower `mask_threshold` "
                "lets more pairs in.",
            )
        if logs.get("sipo/empty_batches", 0) > 0:
            self._warn_once(
                "empty",
                f"Step {state.global_step}: {logs['sipo/empty_batches']:.0f} batch(es) so far were masked altogether "
                "and gave no gradient; `sipo/empty_batches` goes on counting. With few pairs per step this happens by "
                "chance: raise the batch size or `gradient_accumulation_steps`.",
            )
        if logs.get("rewards/saturated_fraction", 0.0) > SATURATED_SHARE:
            self._warn_once(
                "saturated",
                f"Step {state.global_step}: {logs['rewards/saturated_fraction']:.0%} of the logits are saturated, so "
                "most pairs give almost no gradient or a constant one. Lower `beta` or the learning rate, or stop "
                "here.",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


class MaskedWarningCallback(TrainerCallback):
    """Warns once when for some training logs nearly all pairs of a language model's data have been masked."""

    def __init__(self):
        self._masked_logs = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at one training log."""
        if not logs or "sipo/masked_fraction" not in logs or not state.is_world_process_zero:
            return
        self._masked_logs = self._masked_logs + 1 if logs["sipo/masked_fraction"] >= MASKED_SHARE else 0
        if self._masked_logs == MASKED_WINDOW:
            logger.warning(
                "Step %d: for %d logs nearly all pairs have been masked, so training has all but stopped: a flat "
                "curve does not mean that it has converged. Look at `sipo/chosen_importance_weight` and "
                "`sipo/rejected_importance_weight`. Low from the start, the policy could not have written the data: "
                "lower `mask_threshold`, or check that recorded log-probabilities are sums over the same tokens. "
                "Fallen while training: raise `beta`, lower the learning rate, or stop earlier.",
                state.global_step,
                MASKED_WINDOW,
            )


def watching_callbacks(trainer: Any) -> list[TrainerCallback]:
    """The callbacks that a trainer's configuration asks for, besides `RunState`."""
    callbacks: list[TrainerCallback] = [
        MetricsCallback(trainer.recorder, trainer.level_memory),
        DivergenceWarningCallback(),
    ]
    if trainer.args.sync_ref_model:
        callbacks.append(SyncRefModelCallback(ref_model=trainer.ref_model, accelerator=trainer.accelerator))
    if trainer.args.max_drift is not None or trainer.args.max_margin_fall is not None:
        callbacks.append(trainer.divergence_guard)
    if trainer.args.sample_every_steps:
        callbacks.append(SampleGridCallback(trainer))
    return callbacks
