# SPDX-License-Identifier: Apache-2.0
"""What `test_kto_processes.py` runs in every process, and once in its own."""

from pathlib import Path

import torch

from tests.trainer.runs import Method, logged, make_trainer, preference_pairs, trained_weights
from trl_sipo import DiffusionKTOConfig, DiffusionKTOTrainer

KTO = Method("kto", DiffusionKTOTrainer, DiffusionKTOConfig)


def train(output: Path, batch_size: int) -> None:
    """Train on the arms of eight pairs, and let the first process write weights and metrics."""
    trainer = make_trainer(
        KTO,
        output,
        pairs=preference_pairs(8),
        trainer_options={"eval_dataset": preference_pairs(3, seed=5)},
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=6 // (8 // batch_size),
        max_steps=4,
        optim="sgd",
        learning_rate=0.5,
        beta=100.0,
        # So that the policy gets better on all images, and the reference point leaves zero.
        desirable_weight=5.0,
        undesirable_weight=0.1,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = {name: logged(trainer, name) for name in ("loss", "kl", "rewards/margins", "rewards/chosen")}
        torch.save({"weights": trained_weights(trainer), "logs": logs, "metrics": metrics}, output / "result.pt")
    trainer.end()
