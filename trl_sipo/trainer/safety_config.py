# SPDX-License-Identifier: Apache-2.0
"""Settings of what is done when numbers go wrong."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from trl_sipo.errors import ConfigurationError

ON_NONFINITE = ("raise", "skip")
# Optimisers that change weights within the backward pass, after which no step is left to leave out.
_STEPS_IN_BACKWARD = ("lomo", "layerwise")


@dataclass
class SafetyConfig:
    """Settings of what is done when numbers go wrong.

    Args:
        on_nonfinite: What is done when latents, embeddings, errors, the loss or the gradient of a step are NaN or
            infinite. "raise" ends the run. "skip" leaves the whole optimiser step out, counts it in
            `sipo/skipped_steps`, and on a GPU waits for the device once in each step. Evaluation always raises.
        max_skipped_steps: Steps that `on_nonfinite="skip"` may leave out in a run before it raises.
        check_reference: Fail at the first step unless the policy predicts what the reference that was made from it
            predicts. Not done with a `ref_model` of one's own, nor in a resumed run.
        max_drift: Stop when the held-out `drift/chosen_error` is above it: 0.1 is an error on the chosen images ten
            percent larger than the reference's. `None`: never.
        max_margin_fall: Stop when the held-out `rewards/margins` is so far below its best value of the run. `None`:
            never.
    """

    default_max_skipped_steps: ClassVar[int] = 10

    on_nonfinite: str = field(
        default="raise",
        metadata={"help": "What to do about NaN and infinity in a step: end the run (raise) or leave it out (skip)."},
    )
    max_skipped_steps: int = field(
        default=default_max_skipped_steps,
        metadata={"help": "Steps that on_nonfinite='skip' may leave out in a run before it raises."},
    )
    check_reference: bool = field(
        default=True,
        metadata={"help": "Fail at the first step unless policy and reference, made from it, predict the same."},
    )
    max_drift: float | None = field(
        default=None, metadata={"help": "Stop when the held-out drift/chosen_error is above it; never if not given."}
    )
    max_margin_fall: float | None = field(
        default=None,
        metadata={"help": "Stop when the held-out rewards/margins fell so far from its best; never if not given."},
    )

    def check_safety(self) -> None:
        """Raise [`ConfigurationError`] for values out of range, and for those that do nothing."""
        if self.on_nonfinite not in ON_NONFINITE:
            raise ConfigurationError(f"Unknown `on_nonfinite` {self.on_nonfinite!r}; known are {list(ON_NONFINITE)}.")
        limit = self.max_skipped_steps
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ConfigurationError(f"`max_skipped_steps` must be a whole number of zero or more, got {limit!r}.")
        if self.on_nonfinite != "skip" and limit != self.default_max_skipped_steps:
            raise ConfigurationError(
                f"`max_skipped_steps={limit}` only acts with `on_nonfinite='skip'`, but it is {self.on_nonfinite!r}. "
                "Set it, or remove `max_skipped_steps`."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if self.on_nonfinite == "skip" and any(kind in optimizer for kind in _STEPS_IN_BACKWARD):
            raise ConfigurationError(
                f"`on_nonfinite='skip'` contradicts `optim={optimizer!r}`, which changes the weights within the "
                "backward pass, before it is known whether the gradient is finite. Use another optimiser, or "
                "`on_nonfinite='raise'`."
            )
        for name in ("max_drift", "max_margin_fall"):
            self._check_bound(name, getattr(self, name))

    def _check_bound(self, name: str, bound: float | None) -> None:
        if bound is None:
            return
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
            raise ConfigurationError(f"`{name}` must be a positive and finite number, got {bound!r}.")
        if self.eval_strategy == "no":
            raise ConfigurationError(
                f"`{name}={bound}` looks at held-out pairs, but nothing is evaluated during training: set "
                f"`eval_strategy` and give an `eval_dataset`, or remove `{name}`."
            )
