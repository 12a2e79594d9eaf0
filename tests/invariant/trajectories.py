# SPDX-License-Identifier: Apache-2.0
"""Short training runs whose numbers are kept, so that a refactoring can be shown to leave them as they are.

Write them anew, after a change that is meant to move them, and say why in the commit:

    python -m tests.invariant.trajectories
"""

import json
import tempfile
from pathlib import Path

import torch

from tests.trainer.runs import METHODS, logged, make_trainer

GOLDEN = Path(__file__).with_name("trajectories.json")
STEPS = 6
KEYS = ("loss", "rewards/margins", "logps/chosen", "sipo/importance_weight", "sipo/masked_fraction")
# All weights are far more sensitive than a LoRA, so they take smaller steps.
SETTINGS = {"lora": {"learning_rate": 5e-3}, "full": {"learning_rate": 1e-4, "is_lora": False}}
CASES = {f"{method.name}-{kind}": (method, options) for method in METHODS for kind, options in SETTINGS.items()}


def trajectory(case: str, directory: str) -> dict[str, list[float]]:
    """Each key's value at each step."""
    method, options = CASES[case]
    trainer = make_trainer(
        method,
        directory,
        max_steps=STEPS,
        beta=200.0,
        max_grad_norm=1.0,
        caption_dropout=0.2,
        seed=3,
        **options,
    )
    trainer.train()
    return {key: logged(trainer, key) for key in KEYS}


def main() -> None:
    """Run every case and write `trajectories.json`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        golden = {case: trajectory(case, directory) for case in CASES}
    rounded = {
        case: {key: [float(f"{value:.6g}") for value in values] for key, values in run.items()}
        for case, run in golden.items()
    }
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
