# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose held-out numbers pass a bound, before it has used up its steps."""

import logging
from collections.abc import Mapping
from typing import Any

from trl_sipo.trainer import json_checks as checks
from trl_sipo.trainer.run_state import RememberedCallback

logger = logging.getLogger(__name__)

# Ends of the names of the held-out metrics; before them is `eval_`, or `eval_<name>_` of one of several datasets.
DRIFT, MARGIN = "drift/chosen_error", "rewards/margins"


class DivergenceGuard(RememberedCallback):
    """Stops training when the held-out drift is too large, or the held-out margin fell too far from its best.

    What happens to the weights then is transformers' business: with `load_best_model_at_end=True` those of the best
    checkpoint are loaded, which is never one of an evaluation that stopped training.

    Args:
        max_drift: Bound of `drift/chosen_error`; `None` for none.
        max_margin_fall: Bound of the best `rewards/margins` of the run minus the present one; `None` for none.

    Attributes:
        has_diverged: Whether the last evaluation passed a bound.
        best_margins: The largest margin so far, by the name of its metric.
    """

    def __init__(self, max_drift: float | None, max_margin_fall: float | None):
        self.max_drift = max_drift
        self.max_margin_fall = max_margin_fall
        self.has_diverged = False
        self.best_margins: dict[str, float] = {}
        self._is_training = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best_margins": dict(self.best_margins)}

    def check_state(self, state: Any, name: str) -> str | None:
        """A margin for each metric."""
        return checks.record({"best_margins": checks.table(checks.number())})(state, name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what [`state_dict`] gave."""
        self.best_margins = dict(state["best_margins"])

    def on_train_begin(self, args, state, control, **kwargs):
        """From here on an evaluation may stop the run; a run that is not resumed has no best margin yet."""
        self._is_training, self.has_diverged = True, False
        if state.global_step == 0:
            self.best_margins.clear()

    def on_train_end(self, args, state, control, **kwargs):
        """From here on an evaluation stops nothing."""
        self._is_training = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Compare the evaluation of one dataset with the bounds."""
        if not self._is_training or not metrics:
            return
        reasons = self._passed(metrics)
        if not reasons:
            return
        self.has_diverged = control.should_training_stop = True
        if state.is_world_process_zero:
            logger.warning(
                "Step %d: training stops, since %s. %s", state.global_step, " and ".join(reasons), _fate(args, state)
            )

    def _passed(self, metrics: Mapping[str, float]) -> list[str]:
        """The bounds that an evaluation passes, in words; also remembers its margin."""
        reasons = []
        for name, value in metrics.items():
            if name.endswith(DRIFT) and self.max_drift is not None and value > self.max_drift:
                reasons.append(f"`{name}` is {value:.4g}, above `max_drift={self.max_drift:g}`")
            if name.endswith(MARGIN):
                best = self.best_margins[name] = max(value, self.best_margins.get(name, value))
                if self.max_margin_fall is not None and best - value > self.max_margin_fall:
                    reasons.append(
                        f"`{name}` is {value:.4g}, further below its best of {best:.4g} than "
                        f"`max_margin_fall={self.max_margin_fall:g}`"
                    )
        return reasons


def _fate(args: Any, state: Any) -> str:
    """What becomes of the weights."""
    advice = "To go on, lower `learning_rate` or raise `beta`."
    if not args.load_best_model_at_end:
        return (
            "The weights stay as they are: go back to an earlier checkpoint; `load_best_model_at_end=True` does so by "
            f"itself. {advice}"
        )
    if state.best_model_checkpoint is None:
        return f"No earlier evaluation has a checkpoint to fall back to: the weights stay as they are. {advice}"
    return (
        f"The weights of the best checkpoint, {state.best_model_checkpoint} (`{args.metric_for_best_model}` of "
        f"{state.best_metric:.4g}), are loaded. {advice}"
    )
