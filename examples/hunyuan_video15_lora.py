# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on HunyuanVideo-1.5 from preference pairs of videos, with SIPO.

    python examples/hunyuan_video15_lora.py --dataset your/preferences --output hunyuan-video15-lora

A flow model of 8 billion parameters. Its pipeline cannot load a LoRA by itself, its transformer can.

The output folder holds `pytorch_lora_weights.safetensors`, which plain diffusers loads:

    pipe.transformer.load_lora_adapter("hunyuan-video15-lora", use_safetensors=True)
"""

import argparse
from pathlib import Path

from peft import LoraConfig

from trl_sipo import DiffusionSIPOConfig, DiffusionSIPOTrainer, load_preference_dataset


def make_parser() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", help="hub id or folder"
    )
    parser.add_argument("--dataset", required=True, help="hub id, folder or table with prompt, chosen, rejected")
    parser.add_argument("--output", type=Path, default=Path("hunyuan-video15-lora"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1, help="pairs per forward pass")
    parser.add_argument("--accumulation", type=int, default=32, help="forward passes per step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=20.0, help="pull to the reference, Diffusion-DPO convention")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--resolution", type=int, nargs="+", default=[480, 848], help="one side, or height and width")
    parser.add_argument("--frames", type=int, default=61, help="4 k + 1; 1 trains on pairs of images")
    parser.add_argument("--frame-rate", type=float, default=24.0, help="at which clips are taken")
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
        num_frames=options.frames,
        frame_rate=options.frame_rate if options.frames > 1 else None,
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
