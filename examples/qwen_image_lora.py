# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on Qwen-Image from preference pairs of images, with SIPO.

    python examples/qwen_image_lora.py --dataset_name your/preferences

A flow model of 20 billion parameters: on one GPU keep its weights in 4 bits (`load_in_4bit` in
configs/qwen_image_sipo_single_gpu.yaml), or see docs/source/memory.md.

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.load_lora_weights("qwen-image-lora")
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "Qwen/Qwen-Image",
    "output_dir": "qwen-image-lora",
    "beta": 1000.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [1024],  # one side of a square, or height and width
    "timestep_sampling": "logit_normal",  # as the model was trained
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "learning_rate": 1e-5,  # below the 1e-4 usual for LoRA on purpose
    "per_device_train_batch_size": 1,  # pairs of a forward pass
    "gradient_accumulation_steps": 64,
    "max_steps": 1000,
}

if __name__ == "__main__":
    run_as_script("sipo", sys.argv[1:], SETTINGS)
