# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on HunyuanVideo from preference pairs of videos, with SIPO.

    python examples/hunyuan_video_lora.py --dataset_name your/preferences

A guidance-distilled flow model of 13 billion parameters, which is told a guidance scale in training too.

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.load_lora_weights("hunyuan-video-lora")
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "hunyuanvideo-community/HunyuanVideo",
    "output_dir": "hunyuan-video-lora",
    "beta": 20.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [544, 960],  # height and width
    "num_frames": 61,  # 4 k + 1; 1 trains on pairs of images
    "frame_rate": 24.0,  # frames per second at which clips are taken
    "embedded_guidance_scale": 6.0,  # what the pipeline tells the model by default
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
