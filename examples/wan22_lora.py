# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on Wan 2.2 from preference pairs of videos, with SIPO.

    python examples/wan22_lora.py --dataset_name your/preferences

TI2V-5B has one network and a VAE of 16 x 16 x 4. A14B (`--model_name_or_path Wan-AI/Wan2.2-T2V-A14B-Diffusers
--resolution 480 832 --num_frames 81 --frame_rate 16`) has two, one for the noisy levels and one for the others:
both are trained, each on its own levels, and the second one's LoRA is in a file of its own
(docs/source/backbones.md).

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.load_lora_weights("wan22-lora")
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "output_dir": "wan22-lora",
    "beta": 20.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [704, 1280],  # height and width
    "num_frames": 121,  # 4 k + 1; 1 trains on pairs of images
    "frame_rate": 24.0,  # frames per second at which clips are taken
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
