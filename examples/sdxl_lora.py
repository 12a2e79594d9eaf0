# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on Stable Diffusion XL from preference pairs of images, with SIPO.

    python examples/sdxl_lora.py --dataset_name your/preferences

The model predicts noise, as Stable Diffusion 1.5 does, and is told the size of the picture: training tells it what
inference does (no crop, the training resolution). Its VAE overflows in half precision and stays in float32.

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.load_lora_weights("sdxl-lora")
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
    "output_dir": "sdxl-lora",
    "beta": 1000.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [1024],  # one side of a square, or height and width
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "learning_rate": 1e-5,  # below the 1e-4 usual for LoRA on purpose
    "per_device_train_batch_size": 2,  # pairs of a forward pass
    "gradient_accumulation_steps": 32,
    "max_steps": 1000,
}

if __name__ == "__main__":
    run_as_script("sipo", sys.argv[1:], SETTINGS)
