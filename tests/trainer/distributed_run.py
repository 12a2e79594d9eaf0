# SPDX-License-Identifier: Apache-2.0
"""What `test_distributed.py` runs in every process, and once in its own."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import TrainerCallback

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import METHODS, logged, lora, make_trainer, preference_pairs, trained_weights


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first step, after it was clipped."""

    def __init__(self):
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Copy, once."""
        if not self.gradient:
            self.gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(output: Path, method_name: str, kind: str, batch_size: int, options: dict[str, Any]) -> None:
    """Train four steps on two passes over 16 pairs, and let the first process write weights and metrics."""
    method = next(method for method in METHODS if method.name == method_name)
    pipeline = tiny_stable_diffusion()
    if kind == "trained_lora":
        torch.manual_seed(5)
        pipeline.unet = get_peft_model(pipeline.unet, lora(target_modules=["to_q", "to_v"], init_lora_weights=False))
    first = FirstGradient()
    settings = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "caption_dropout": 0.3,
        "random_flip": True,
        "center_crop": False,
        # As users run: activation checkpointing is on by default.
        "gradient_checkpointing": True,
    }
    trainer = make_trainer(
        method,
        output,
        model=pipeline,
        is_lora=kind == "new_lora",
        pairs=preference_pairs(16, width=64),
        trainer_options={"eval_dataset": preference_pairs(7, seed=5), "callbacks": [first]},
        **{**settings, **options},
    )
    trainer.evaluate()  # leaves nothing behind, above all no policy that is trained by each process for itself
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        result = {
            "weights": trained_weights(trainer),
            "gradient": first.gradient,
            "metrics": metrics,
            "loss": logged(trainer, "loss"),
            "masked": logged(trainer, "sipo/masked_fraction"),
            "processes": trainer.accelerator.num_processes,
            "described": trainer.describe_run(),
        }
        torch.save(result, output / "result.pt")
    trainer.end()
