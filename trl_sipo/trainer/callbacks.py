# SPDX-License-Identifier: Apache-2.0
"""What watches a run: its metrics, and warnings when training goes wrong."""

import logging
from typing import Any

from transformers import TrainerCallback

from trl_sipo.trainer._trl_compat import SyncRefModelCallback
from trl_sipo.trainer.metrics_recorder import RECORDED
from trl_sipo.trainer.run_log_callback import RunLogCallback
from trl_sipo.trainer.run_state import RememberedCallback
from trl_sipo.trainer.run_warnings import MASKED_SHARE, MASKED_WINDOW, RunWarnings
from trl_sipo.trainer.sample_grids import SampleGridCallback

logger = logging.getLogger(__name__)


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
    """Warns once, with advice, when the winner's error rises steadily, when all is masked, or when logits saturate."""

    def __init__(self):
        self._warnings = RunWarnings()

    def state_dict(self) -> dict[str, Any]:
        """The last logs; not what was warned of, which whoever reads the log of a resumed run has not seen."""
        return self._warnings.state_dict()

    def check_state(self, state: Any, name: str) -> str | None:
        """A few logs, and how many were masked."""
        return self._warnings.check_state(state, name)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        self._warnings.load_state_dict(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at one training log."""
        if logs and state.is_world_process_zero:
            for message in self._warnings.look(state.global_step, logs):
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
    if trainer.args.run_log:
        callbacks.append(RunLogCallback(trainer))
    if trainer.args.sync_ref_model:
        callbacks.append(SyncRefModelCallback(ref_model=trainer.ref_model, accelerator=trainer.accelerator))
    if trainer.args.max_drift is not None or trainer.args.max_margin_fall is not None:
        callbacks.append(trainer.divergence_guard)
    if trainer.args.sample_every_steps:
        callbacks.append(SampleGridCallback(trainer))
    return callbacks
