# SPDX-License-Identifier: Apache-2.0
"""What `test_batches_processes.py` runs in every process, and once in its own."""

from pathlib import Path

import pytest
import torch

from tests.trainer.runs import SIPO, logged, make_trainer, preference_pairs, trained_weights
from trl_sipo.errors import ConfigurationError


def train_on_ten_pairs(output: Path, batch_size: int) -> None:
    """Three epochs of one step of eight pairs each, which leave two pairs out."""
    trainer = make_trainer(
        SIPO,
        output,
        pairs=preference_pairs(10),
        per_device_train_batch_size=batch_size,
        dataloader_drop_last=True,
        max_steps=3,
        optim="sgd",
        learning_rate=0.5,
        beta=100.0,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        result = {"weights": trained_weights(trainer), "loss": logged(trainer, "loss"), "epoch": trainer.state.epoch}
        torch.save(result, output / f"result-{trainer.accelerator.num_processes}.pt")
    trainer.end()


def refuse(output: Path) -> None:
    """Batches that are not what is printed, and those of different sizes, which processes cannot join."""
    with pytest.raises(ConfigurationError, match=r"`split_batches` .* `per_device_train_batch_size`"):
        make_trainer(SIPO, output, accelerator_config={"split_batches": True})
    with pytest.raises(ConfigurationError, match=r"`even_batches` .* would wait for one another"):
        make_trainer(SIPO, output, accelerator_config={"even_batches": False})
