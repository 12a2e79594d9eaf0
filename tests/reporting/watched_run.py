# SPDX-License-Identifier: Apache-2.0
"""A real run in a process of its own, which at step 2 waits until a page that somebody writes of it shows that step.

python -m tests.reporting.watched_run FOLDER PAGE
"""

import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.trainer.runs import SIPO, make_trainer, preference_pairs

STEPS, SHOWN = 4, 2


class WaitsForPage(TrainerCallback):
    """Holds the run still until its page shows a step."""

    def __init__(self, page: Path):
        self.page = page

    def on_step_begin(self, args, state, control, **kwargs):
        """Wait once, after the step was logged."""
        while state.global_step == SHOWN and f"step {SHOWN} of {STEPS}" not in self.page.read_text(encoding="utf-8"):
            time.sleep(0.1)


def train(folder: Path, page: Path) -> None:
    """Train, and evaluate once more afterwards, as scripts do."""
    torch.set_num_threads(1)
    while not page.exists():
        time.sleep(0.1)
    held_out = {"eval_dataset": preference_pairs(2, seed=1), "callbacks": [WaitsForPage(page)]}
    options = {"max_steps": STEPS, "eval_strategy": "steps", "eval_steps": STEPS, "eval_noise_levels": 2}
    trainer = make_trainer(SIPO, folder, trainer_options=held_out, **options)
    trainer.train()
    trainer.evaluate()
