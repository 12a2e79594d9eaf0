# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on Stable Diffusion XL from preference pairs of images, with SIPO.

    python examples/sdxl_lora.py --dataset your/preferences --output sdxl-lora

The model predicts noise, as Stable Diffusion 1.5 does, and is told the size of the picture: training tells it what
inference does (no crop, the training resolution). Its VAE overflows in half precision and stays in float32.

The output folder holds `pytorch_lora_weights.safetensors`, which plain diffusers loads:

    pipe.load_lora_weights("sdxl-lora")
"""

import argparse
from pathlib import Path

from peft import LoraConfig

from trl_sipo import DiffusionSIPOConfig, DiffusionSIPOTrainer, load_preference_dataset


def make_parser() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="hub id or folder")
    parser.add_argument("--dataset", required=True, help="hub id, folder or table with prompt, chosen, rejected")
    parser.add_argument("--output", type=Path, default=Path("sdxl-lora"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=2, help="pairs per forward pass")
    parser.add_argument("--accumulation", type=int, default=32, help="forward passes per step")
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
