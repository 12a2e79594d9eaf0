# SPDX-License-Identifier: Apache-2.0
"""What `test_distributed.py` starts in every process: `distributed_run.py <output> <method> <kind> <batch size>`."""

import sys
from pathlib import Path

import torch
from peft import get_peft_model

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import METHODS, logged, lora, make_trainer, preference_pairs, trained_weights


def main(output: str, method_name: str, kind: str, batch_size: int) -> None:
    """Train three steps on two passes over 16 pairs, and let the first process write weights and metrics."""
    torch.set_num_threads(1)
    method = next(method for method in METHODS if method.name == method_name)
    pipeline = tiny_stable_diffusion()
    if kind == "trained_lora":
        torch.manual_seed(5)
        pipeline.unet = get_peft_model(pipeline.unet, lora(target_modules=["to_q", "to_v"], init_lora_weights=False))
    trainer = make_trainer(
        method,
        Path(output),
        model=pipeline,
        is_lora=kind == "new_lora",
        pairs=preference_pairs(16, width=64),
        trainer_options={"eval_dataset": preference_pairs(7, seed=5)},
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        max_steps=4,
        optim="sgd",
        learning_rate=1e-2,
        caption_dropout=0.3,
        random_flip=True,
        center_crop=False,
        # As users run: activation checkpointing is on by default.
        gradient_checkpointing=True,
        sample_prompts=["a red cat"],
        sample_every_steps=2,
        sample_num_inference_steps=1,
    )
    trainer.evaluate()  # leaves nothing behind, above all no policy that is trained by each process for itself
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        result = {
            "weights": trained_weights(trainer),
            "metrics": metrics,
            "loss": logged(trainer, "loss"),
            "masked": logged(trainer, "sipo/masked_fraction"),
            "processes": trainer.accelerator.num_processes,
        }
        torch.save(result, Path(output, "result.pt"))
    # Without it a thread of gloo may still run when the interpreter ends, which aborts the process.
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
