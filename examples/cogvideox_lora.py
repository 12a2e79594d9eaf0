# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on CogVideoX from preference pairs of videos, with SIPO.

    python examples/cogvideox_lora.py --dataset_name your/preferences

A v-prediction model on a schedule with zero terminal signal-to-noise ratio. 2B, 5B and 1.5-5B differ in their
configuration only, which is read from the checkpoint (1.5: `--resolution 768 1360 --num_frames 81 --frame_rate
16`).

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.load_lora_weights("cogvideox-lora")
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "zai-org/CogVideoX-2b",
    "output_dir": "cogvideox-lora",
    "beta": 20.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [480, 720],  # height and width
    "num_frames": 49,  # 8 k + 1; 1 trains on pairs of images
    "frame_rate": 8.0,  # frames per second at which clips are taken
    "use_peft": True,
    "lora_r": 64,
    "lora_alpha": 64,
    "learning_rate": 1e-5,  # below the 1e-4 usual for LoRA on purpose
    "per_device_train_batch_size": 1,  # pairs of a forward pass
    "gradient_accumulation_steps": 32,
    "max_steps": 1000,
}

if __name__ == "__main__":
    run_as_script("sipo", sys.argv[1:], SETTINGS)
