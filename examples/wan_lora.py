# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on Wan 2.1 from preference pairs of videos, with SIPO.

    python examples/wan_lora.py --dataset_name your/preferences

A flow model. 14B: `--model_name_or_path Wan-AI/Wan2.1-T2V-14B-Diffusers`. With `--num_frames 1` it learns from
pairs of images.

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.load_lora_weights("wan-lora")
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "output_dir": "wan-lora",
    "beta": 20.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [480, 832],  # height and width
    "num_frames": 81,  # 4 k + 1; 1 trains on pairs of images
    "frame_rate": 16.0,  # frames per second at which clips are taken
    "use_peft": True,
    "lora_r": 32,
    "lora_alpha": 32,
    "learning_rate": 1e-5,  # below the 1e-4 usual for LoRA on purpose
    "per_device_train_batch_size": 1,  # pairs of a forward pass
    "gradient_accumulation_steps": 32,
    "max_steps": 1000,
}

if __name__ == "__main__":
    run_as_script("sipo", sys.argv[1:], SETTINGS)
