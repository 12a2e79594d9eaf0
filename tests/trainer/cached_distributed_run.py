# SPDX-License-Identifier: Apache-2.0
"""What `test_cached_training.py` starts in every process: `cached_distributed_run.py <model> <cache> <output>`."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig

from tests.trainer.runs import DPO, logged, make_config, trained_weights
from trl_sipo.data.loading import load_preference_dataset


def main(model: str, cache: str, output: str) -> None:
    """Train on pairs of several shapes, and let every process write what it saw and where it ended."""
    torch.set_num_threads(1)
    trainer = DPO.trainer_class(
        model,
        args=make_config(
            DPO, output, resolution=[32, 32], max_steps=16, per_device_train_batch_size=2, dataloader_num_workers=1
        ),
        train_dataset=load_preference_dataset(cache),
        peft_config=LoraConfig(r=4, lora_alpha=10),
    )
    shapes = []
    step = trainer._training_loss

    def observed(model, inputs):
        shapes.append((tuple(inputs["chosen_latents"].shape), tuple(inputs["rejected_latents"].shape)))
        return step(model, inputs)

    trainer._training_loss = observed
    trainer.train()
    result = {"shapes": shapes, "weights": trained_weights(trainer), "loss": logged(trainer, "loss")}
    torch.save(result, Path(output, f"result-{trainer.args.process_index}.pt"))
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
