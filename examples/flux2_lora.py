# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on FLUX.2 [klein] from preference pairs of images, with SIPO.

    python examples/flux2_lora.py --dataset your/preferences --output flux2-lora

Klein's base models are not distilled, so preferences move them without undoing a distillation. `--model black-
forest-labs/FLUX.2-dev` works too, but has 32 billion parameters: see docs/source/memory.md.

The output folder holds `pytorch_lora_weights.safetensors`, which plain diffusers loads:

    pipe.load_lora_weights("flux2-lora")
"""

import argparse
from pathlib import Path

from peft import LoraConfig

from trl_sipo import DiffusionSIPOConfig, DiffusionSIPOTrainer, load_preference_dataset


def make_parser() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="black-forest-labs/FLUX.2-klein-base-4B", help="hub id or folder")
    parser.add_argument("--dataset", required=True, help="hub id, folder or table with prompt, chosen, rejected")
    parser.add_argument("--output", type=Path, default=Path("flux2-lora"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1, help="pairs per forward pass")
    parser.add_argument("--accumulation", type=int, default=64, help="forward passes per step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=1000.0, help="pull to the reference, Diffusion-DPO convention")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--resolution", type=int, nargs="+", default=[1024], help="one side, or height and width")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(options: argparse.Namespace) -> None:
    """Train and save."""
    config = DiffusionSIPOConfig(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        beta=options.beta,
        resolution=options.resolution,
        timestep_sampling="logit_normal",
        logging_steps=min(10, options.steps),
        seed=options.seed,
    )
    trainer = DiffusionSIPOTrainer(
        model=options.model,
        args=config,
        train_dataset=load_preference_dataset(options.dataset, split="train"),
        peft_config=LoraConfig(r=options.rank, lora_alpha=options.rank, init_lora_weights="gaussian"),
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()


if __name__ == "__main__":
    main(make_parser().parse_args())
