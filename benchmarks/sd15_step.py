# SPDX-License-Identifier: Apache-2.0
"""What one training step costs on a Stable Diffusion 1.5 of real size, through the real trainers.

    python benchmarks/sd15_step.py --threads 1                   # a CPU: bfloat16, latents of 32x32, about 3 GiB
    python benchmarks/sd15_step.py --device cuda --latent-size 64 --steps 20 --checkpointing

The U-Net has the published configuration (859.5 M parameters) and random weights, so nothing is downloaded. The step
takes latents, and the text encoder has one small layer: a prompt is encoded once and then cached, in this benchmark as
in training. Prints a table and writes JSON.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import string
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PrinterCallback, TrainerCallback

from trl_sipo.cost.architectures import default_dtype
from trl_sipo.scripts.env import environment
from trl_sipo.trainer.callbacks import DivergenceWarningCallback
from trl_sipo.trainer.methods import method_classes

# Method -> (name in trl_sipo.trainer.methods, settings).
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "dpo, kappa 0.5": ("dpo", {"proximal_kappa": 0.5}),
    "sipo": ("sipo", {}),
    "dpo_cm": ("sipo", {"objective": "dpo_cm"}),
    "poly-dpo": ("poly-dpo", {}),
}
SD15_UNET: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8}
TINY_UNET: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "attention_head_dim": 2, "norm_num_groups": 4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS, TEXT_WIDTH = 77, 768
SPATIAL_MULTIPLE = 8


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["dpo", "sipo"], help="one after another")
    parser.add_argument("--latent-size", type=int, default=32, help="64 for images of 512 px (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=1, help="pairs per step (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the frozen weights and of autocast")
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--full", action="store_true", help="all weights, in float32, instead of a LoRA")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny U-Net, to see that this script works")
    parser.add_argument("--output", type=Path, default=Path("sd15_step.json"), help="default: %(default)s")
    return parser


def make_unet(options: argparse.Namespace) -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.5 with random weights."""
    size = TINY_UNET if options.tiny else SD15_UNET
    with default_dtype(torch.float32 if options.full else DTYPES[options.dtype]):
        return UNet2DConditionModel(sample_size=options.latent_size, cross_attention_dim=TEXT_WIDTH, **size)


def make_pipeline(options: argparse.Namespace) -> StableDiffusionPipeline:
    """The U-Net in a pipeline whose other parts are as small as they can be."""
    torch.manual_seed(0)
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=12,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=make_unet(options).eval(),
        scheduler=DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def latent_pairs(options: argparse.Namespace) -> datasets.Dataset:
    """Pairs of random latents, enough for every step to see others."""
    count, shape = options.pairs * options.steps, (4, options.latent_size, options.latent_size)
    arms = torch.randn(2, count, *shape, generator=torch.Generator().manual_seed(1)).numpy()
    feature = datasets.Array3D(shape, "float32")
    return datasets.Dataset.from_dict(
        {"prompt": ["a red cat"] * count, "chosen_latents": arms[0], "rejected_latents": arms[1]},
        features=datasets.Features(
            {"prompt": datasets.Value("string"), "chosen_latents": feature, "rejected_latents": feature}
        ),
    )


class StepTimer(TrainerCallback):
    """Wall and processor seconds of each step: from the batch to the updated weights."""

    def __init__(self):
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Start."""
        self._began = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop."""
        wall, cpu = self._now()
        self.seconds.append(wall - self._began[0])
        self.cpu_seconds.append(cpu - self._began[1])

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def peak_memory_gib(device: str) -> float:
    """Of the allocator on a GPU since the run began; of the whole process, which never falls, on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def make_trainer(
    method: str, pipeline: StableDiffusionPipeline, options: argparse.Namespace, folder: str, timer: StepTimer
) -> Any:
    """The method's trainer, with a new LoRA unless all weights are trained."""
    name, settings = METHODS[method]
    config_class, trainer_class = method_classes(name)
    trainer = trainer_class(
        pipeline,
        args=config_class(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.pairs,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            bf16=options.dtype == "bfloat16",
            fp16=options.dtype == "float16",
            gradient_checkpointing=options.checkpointing,
            resolution=SPATIAL_MULTIPLE * options.latent_size,
            use_cpu=options.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=latent_pairs(options),
        callbacks=[timer],
        peft_config=None if options.full else LoraConfig(r=options.rank, lora_alpha=options.rank),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(DivergenceWarningCallback)  # random weights are not worth a warning
    return trainer


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def measure(
    method: str, pipeline: StableDiffusionPipeline, options: argparse.Namespace, folder: str
) -> dict[str, Any]:
    """Train for some steps with one method; the pipeline's U-Net comes back without LoRA."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timer, forward_passes = StepTimer(), []
    # Kept by a deep copy, so that the frozen reference of full fine-tuning counts too.
    counter = pipeline.unet.register_forward_hook(lambda *_: forward_passes.append(1))
    trainer = make_trainer(method, pipeline, options, folder, timer)
    trainer.train()
    counter.remove()
    logs = [row for row in trainer.state.log_history if "sipo/masked_fraction" in row]
    result = {
        "method": method,
        "seconds": statistics.median(timer.seconds[1:]),
        "cpu_seconds": statistics.median(timer.cpu_seconds[1:]),
        "peak_memory_gib": peak_memory_gib(options.device),
        "forward_passes_per_step": len(forward_passes) / options.steps,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "masked_fraction": statistics.mean(row["sipo/masked_fraction"] for row in logs),
        "all_seconds": timer.seconds,
        "all_cpu_seconds": timer.cpu_seconds,
    }
    if not options.full:
        trainer.model.unload()
    return result


def table(runs: list[dict[str, Any]], device: str) -> str:
    """The runs as a Markdown table, with the ratio of each to the first."""
    memory = "peak on the GPU, GiB" if device == "cuda" else "peak RSS so far, GiB"
    lines = [
        f"| method | s/step | CPU s/step | to {runs[0]['method']} (wall) | to {runs[0]['method']} (CPU) | {memory} | "
        "U-Net calls/step |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        wall, cpu = (run[key] / runs[0][key] for key in ("seconds", "cpu_seconds"))
        lines.append(
            f"| {run['method']} | {run['seconds']:.2f} | {run['cpu_seconds']:.2f} | {wall:.2f} | {cpu:.2f} | "
            f"{run['peak_memory_gib']:.2f} | {run['forward_passes_per_step']:g} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is not counted.")
    if options.threads:
        torch.set_num_threads(options.threads)
    pipeline = make_pipeline(options)
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    runs = []
    for method in options.method:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(method, pipeline, options, folder))
        gc.collect()
    result = {
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "unet_parameters": parameters,
        "environment": {
            **environment(),
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_1min": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        },
        "runs": runs,
    }
    print(f"\nU-Net of {parameters / 1e6:.1f} M parameters, {options.dtype}, {options.device}")
    print(table(runs, options.device))
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
