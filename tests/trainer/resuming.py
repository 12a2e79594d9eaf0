# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, to be compared to the bit with what another one does."""

from pathlib import Path
from typing import Any

import torch

# Times differ from run to run.
_TIMED = ("runtime", "per_second")


def end_of(trainer: Any) -> dict[str, Any]:
    """Weights, reference, optimiser, scheduler and random state, and all rows of the log but their times."""
    return {
        "weights": dict(trainer.unwrapped_model.named_parameters()),
        "reference": None if trainer.ref_model is None else trainer.ref_model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "log": untimed(trainer.state.log_history),
    }


def untimed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a log without their times."""
    return [{key: row[key] for key in row if not key.endswith(_TIMED)} for row in log]


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Where two nested structures differ, a NaN being equal to itself."""
    if isinstance(left, torch.Tensor):
        same = isinstance(right, torch.Tensor) and torch.equal(left, right)
        return [] if same else [where]
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{where}: {sorted(map(str, left.keys() ^ right.keys()))}"]
        return [found for key in left for found in differences(left[key], right[key], f"{where}/{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [f"{where}: {len(left)} and {len(right)} entries"]
        pairs = enumerate(zip(left, right, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, f"{where}/{index}")]
    return [] if left == right or (left != left and right != right) else [f"{where}: {left!r} and {right!r}"]


def recorded_order(trainer: Any) -> list[list[int]]:
    """The pairs of every batch that the trainer is going to see, filled while it trains."""
    order: list[list[int]] = []
    step = trainer._training_loss

    def observed(model: Any, inputs: Any) -> Any:
        order.append(inputs["pair_index"].tolist())
        return step(model, inputs)

    trainer._training_loss = observed
    return order


def last_step(folder: Path) -> int:
    """Steps of the last checkpoint in a folder."""
    return max(int(path.name.rsplit("-", 1)[1]) for path in folder.glob("checkpoint-*"))
