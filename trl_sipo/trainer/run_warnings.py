# SPDX-License-Identifier: Apache-2.0
"""When a run is to be warned of, and with which advice: from its training logs alone, while it runs or afterwards."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from trl_sipo.trainer import json_checks as checks

# Consecutive logs over which the winner's error must rise before a warning, and the rise that is worth one.
DRIFT_WINDOW = 5
DRIFT_RISE = 0.05
# Share of masked pairs, and of saturated logits, above which training has all but stopped; and the consecutive logs
# that must show the masked share, since a single small batch is masked altogether by chance.
MASKED_SHARE = 0.99
MASKED_WINDOW = 3
SATURATED_SHARE = 0.5


class RunWarnings:
    """Looks at one training log after the other.

    Reads the keys `drift/chosen_error`, `sipo/masked_fraction`, `sipo/empty_batches` and `rewards/saturated_fraction`.
    """

    def __init__(self) -> None:
        self._drift: deque[float] = deque(maxlen=DRIFT_WINDOW)
        self._masked_logs = 0
        self._given: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """The last logs; not what was warned of, which whoever reads the log of a resumed run has not seen."""
        return {"drift": list(self._drift), "masked_logs": self._masked_logs}

    def check_state(self, state: Any, name: str) -> str | None:
        """A few logs, and how many were masked."""
        drift = checks.items(checks.number(is_finite=False), high=DRIFT_WINDOW)
        return checks.record({"drift": drift, "masked_logs": checks.count()})(state, name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with them."""
        self._drift.extend(state["drift"])
        self._masked_logs = state["masked_logs"]

    def look(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """The warnings that the log of a step gives rise to, each kind once; logs without drift are no training logs.

        Returns:
            Sentences, which begin with the step.
        """
        if "drift/chosen_error" not in logs:
            return []
        new = [(kind, text) for kind, text in self._found(logs) if kind not in self._given]
        self._given.update(kind for kind, _ in new)
        return [f"Step {step}: {text}" for _, text in new]

    def _found(self, logs: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        has_term = "proximal/loss" in logs  # which a mask leaves as it is
        self._drift.append(logs["drift/chosen_error"])
        drift = list(self._drift)
        steps = zip(drift, drift[1:], strict=False)
        rising = len(drift) == DRIFT_WINDOW and all(later > earlier for earlier, later in steps)
        if rising and drift[-1] > DRIFT_RISE:
            yield (
                "drift",
                f"the error on the chosen images has risen for {DRIFT_WINDOW} logs and is {drift[-1]:.0%} above the "
                "reference's. The margin then grows by forgetting, and images degrade. Lower the learning rate, raise "
                f"`beta`, stop earlier, or {'raise' if has_term else 'add'} `proximal_kappa` or `sft_weight`; SIPO "
                "and DPO-C&M mask such pairs.",
            )
        self._masked_logs = self._masked_logs + 1 if logs.get("sipo/masked_fraction", 0.0) >= MASKED_SHARE else 0
        if self._masked_logs >= MASKED_WINDOW:
            yield (
                "masked",
                f"for {MASKED_WINDOW} logs nearly all pairs have been masked, so "
                f"{'that only the proximal term acts' if has_term else 'training has all but stopped'}: a flat "
                "curve does not mean that it has converged. The policy has left the data: go back to an earlier "
                "checkpoint, lower the learning rate or raise `beta`; a lower `mask_threshold` lets more pairs in.",
            )
        if logs.get("sipo/empty_batches", 0) > 0:
            yield (
                "empty",
                f"{logs['sipo/empty_batches']:.0f} batch(es) so far were masked altogether and gave no gradient"
                f"{' but that of the proximal term' if has_term else ''}; "
                "`sipo/empty_batches` goes on counting. With few pairs per step this happens by chance: raise the "
                "batch size or `gradient_accumulation_steps`.",
            )
        if logs.get("rewards/saturated_fraction", 0.0) > SATURATED_SHARE:
            yield (
                "saturated",
                f"{logs['rewards/saturated_fraction']:.0%} of the logits are saturated, so most pairs give almost no "
                "gradient or a constant one. Lower `beta` or the learning rate, or stop here.",
            )
