# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on a Stable Diffusion 1.x or 2.x from preference pairs, then draw one prompt before and after.

    python examples/sd15_lora.py --dataset path/or/hub-id --method sipo --steps 2000

The output folder holds `pytorch_lora_weights.safetensors`, which plain diffusers loads, and `comparison.png`: the base
model on the left, the tuned one on the right, same prompt, same seed.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image

from trl_sipo import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionPolyDPOConfig,
    DiffusionPolyDPOTrainer,
    DiffusionSIPOConfig,
    DiffusionSIPOTrainer,
    load_preference_dataset,
)

# Method -> trainer, configuration, and what the method sets. beta is in the Diffusion-DPO convention throughout.
METHODS = {
    "dpo": (DiffusionDPOTrainer, DiffusionDPOConfig, {"beta": 5000.0}),
    "sipo": (DiffusionSIPOTrainer, DiffusionSIPOConfig, {"beta": 1000.0, "objective": "sipo"}),
    "dpo_cm": (DiffusionSIPOTrainer, DiffusionSIPOConfig, {"beta": 1000.0, "objective": "dpo_cm"}),
    "poly-dpo": (DiffusionPolyDPOTrainer, DiffusionPolyDPOConfig, {"beta": 1000.0, "poly_alpha": 8.0}),
}


def make_parser() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="hub id or folder")
    parser.add_argument("--dataset", required=True, help="hub id, folder or table with prompt, chosen, rejected")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", type=Path, default=Path("sd15-lora"))
    parser.add_argument("--method", choices=METHODS, default="sipo")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per forward pass")
    parser.add_argument("--accumulation", type=int, default=16, help="forward passes per step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, help="pull to the reference; the method's published value if not given")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA")
    parser.add_argument("--resolution", type=int, help="the model's own if not given")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--prompt", default="a photograph of an astronaut riding a horse", help="to draw at the end")
    parser.add_argument("--inference-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def train(options: argparse.Namespace) -> None:
    """Train and save."""
    trainer_class, config_class, settings = METHODS[options.method]
    if options.beta is not None:
        settings = {**settings, "beta": options.beta}
    config = config_class(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        resolution=options.resolution,
        dataloader_num_workers=options.workers,
        logging_steps=min(10, options.steps),
        seed=options.seed,
        **settings,
    )
    trainer = trainer_class(
        model=str(options.model),
        args=config,
        train_dataset=load_preference_dataset(options.dataset, split=options.split),
        peft_config=LoraConfig(r=options.rank, lora_alpha=options.rank, init_lora_weights="gaussian"),
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()


@torch.no_grad()
def compare(options: argparse.Namespace) -> Path:
    """Draw the prompt with the base and the tuned model, from the same noise; returns the picture's path."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(options.model, dtype=dtype).to(device)
    images = []
    for tuned in (False, True):
        if tuned:
            pipeline.load_lora_weights(options.output)
        drawn = pipeline(
            options.prompt,
            height=options.resolution,
            width=options.resolution,
            num_inference_steps=options.inference_steps,
            generator=torch.Generator().manual_seed(options.seed),
        )
        images.append(drawn.images[0])
    width, height = images[0].size
    both = Image.new("RGB", (2 * width, height))
    both.paste(images[0], (0, 0))
    both.paste(images[1], (width, 0))
    both.save(options.output / "comparison.png")
    return options.output / "comparison.png"


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    train(arguments)
    print(f"LoRA in {arguments.output}; base beside tuned model in {compare(arguments)}")
