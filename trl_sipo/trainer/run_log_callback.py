# SPDX-License-Identifier: Apache-2.0
"""Writes the log of a run down while it goes on, for `trl-sipo report` and whoever looks at it later."""

import logging
import time
from pathlib import Path
from typing import Any

from trl_sipo.trainer.run_log import LEVELS, MARK, METRICS, RunLog
from trl_sipo.trainer.run_start import describe_start
from trl_sipo.trainer.run_state import RememberedCallback
from trl_sipo.trainer.sample_files import set_samples_aside

logger = logging.getLogger(__name__)


class RunLogCallback(RememberedCallback):
    """Keeps the files of `<output_dir>/run_log`, from the first `train()` on; the main process alone writes.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._log: RunLog | None = None
        self._mark: dict[str, Any] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin the log, or go on with it."""
        mark, self._mark, self._log = self._mark, None, None
        if not state.is_world_process_zero:
            return
        folder, start = Path(args.output_dir), describe_start(self.trainer)
        try:
            if state.global_step == 0:
                set_samples_aside(folder)  # a new run that draws none would pass the earlier ones for its own
                self._log = RunLog.begin(folder, start)
            else:
                self._log = RunLog.resume(folder, start, step=state.global_step, mark=mark)
        except OSError as error:  # rather no log than one that is mixed with another
            logger.warning(
                "The run keeps no log: its folder %s/run_log cannot be made or gone on with (%s). Training goes on.",
                folder,
                error,
            )

    def on_log(self, args, state, control, **kwargs):
        """Write the row that was logged, and what has been seen of the noise levels since the one before."""
        if self._log is None:
            return
        row = state.log_history[-1]
        first = {"step": row["step"], "epoch": row.get("epoch"), "time": time.time()}
        self._log.write(METRICS, first | row)
        for line in self.trainer.recorder.levels.take(row, row["step"]):
            self._log.write(LEVELS, line)

    def state_dict(self) -> dict[str, Any]:
        """Whose log it is, and how long."""
        return {} if self._log is None else self._log.mark()

    def check_state(self, state: Any, name: str) -> str | None:
        """A mark, or nothing."""
        return None if state == {} else MARK(state, name)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember it until training begins."""
        self._mark = state or None
