# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on FLUX.1-dev from preference pairs of images, with SIPO.

    python examples/flux_lora.py --dataset_name your/preferences

A guidance-distilled flow model, which is told a guidance scale in training too. The shift of its noise levels
grows with the resolution. The repository is gated: accept its licence and run `hf auth login`.

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.load_lora_weights("flux-lora")
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "output_dir": "flux-lora",
    "beta": 1000.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [1024],  # one side of a square, or height and width
    "timestep_sampling": "logit_normal",  # as the model was trained
    "embedded_guidance_scale": 3.5,  # what the pipeline tells the model by default
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
