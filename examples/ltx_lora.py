# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on LTX-Video from preference pairs of videos, with SIPO.

    python examples/ltx_lora.py --dataset_name your/preferences

A flow model that is told the frame rate: it gets that of the clips.

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.load_lora_weights("ltx-lora")
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "Lightricks/LTX-Video",
    "output_dir": "ltx-lora",
    "beta": 20.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [512, 704],  # height and width
    "num_frames": 121,  # 8 k + 1; 1 trains on pairs of images
    "frame_rate": 25.0,  # frames per second at which clips are taken
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
