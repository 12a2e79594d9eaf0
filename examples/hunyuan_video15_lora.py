# SPDX-License-Identifier: Apache-2.0
"""Train a LoRA on HunyuanVideo-1.5 from preference pairs of videos, with SIPO.

    python examples/hunyuan_video15_lora.py --dataset_name your/preferences

A flow model of 8 billion parameters. Its pipeline cannot load a LoRA by itself, its transformer can.

Every setting below, and every other one of `trl-sipo sipo --help`, can be given on the command line. The output folder
holds the LoRA and a model card; plain diffusers loads it:

    pipe.transformer.load_lora_adapter("hunyuan-video15-lora", use_safetensors=True)
"""

import sys

from trl_sipo.scripts.train import run_as_script

SETTINGS = {
    "model_name_or_path": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    "output_dir": "hunyuan-video15-lora",
    "beta": 20.0,  # pull to the reference, in the Diffusion-DPO convention
    "resolution": [480, 848],  # height and width
    "num_frames": 61,  # 4 k + 1; 1 trains on pairs of images
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
