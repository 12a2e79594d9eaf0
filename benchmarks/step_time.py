# SPDX-License-Identifier: Apache-2.0
"""What a training step costs beside a bare loop with the same network passes, and beside the step of others.

    python benchmarks/step_time.py --threads 1               # a CPU: a U-Net of 41 M parameters at 128 px, 4 pairs
    python benchmarks/step_time.py --device cuda --latent-size 64 --unet sd15

The variants take turns, step by step, so that what disturbs the machine disturbs all of them; the ratios are of the
medians of one run. Weights are random and nothing is downloaded. A step is: the batch's forward passes, the backward
pass, clipping, the optimiser. Prints a table and writes JSON.

- `bare`: latents and embeddings at hand, one reference and one policy pass over both arms, the loss, nothing else.
- `bare, no reference`: the same without the reference pass, whose errors are given.
- `peer`: as the Diffusion-DPO example of diffusers is described: images and prompts encoded in every step, and each
  arm in a pass of its own.
- the others: this library's trainers.
"""

import argparse
import json
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.functional import logsigmoid
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trl_sipo.scripts.env import environment
from trl_sipo.trainer import reference_bank
from trl_sipo.trainer.methods import method_classes

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8},
    "41M": {
        "block_out_channels": (128, 192, 352),
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "tiny": {
        "block_out_channels": (8, 16),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}
VAE_CHANNELS = {"sd15": (128, 256, 512, 512), "41M": (64, 128, 256, 256), "tiny": (4, 4, 4, 4)}
TEXT_LAYERS = {"sd15": 12, "41M": 6, "tiny": 1}
TEXT_WIDTH, TOKENS, SPATIAL_MULTIPLE = 768, 77, 8
PROMPTS = ("a red cat", "two dogs on a boat", "a house by the sea", "an old man")

# Name -> (method, settings of the trainer). Cached: the data are latents.
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Diffusion-DPO": ("dpo", {}),
    "SIPO": ("sipo", {}),
    "DPO-C&M": ("sipo", {"objective": "dpo_cm"}),
    "Poly-DPO": ("poly-dpo", {}),
    "split arms": ("dpo", {"split_pair_backward": True}),
    "precomputed reference": ("dpo", {"precompute_ref_log_probs": True, "num_ref_draws": 1}),
    "images encoded in the step": ("dpo", {}),
}
# Ratio -> (numerator, denominator, target, whether it should be below)
RATIOS = {
    "step / bare loop": ("Diffusion-DPO", "bare", 1.03, True),
    "SIPO / bare loop": ("SIPO", "bare", 1.03, True),
    "DPO-C&M / bare loop": ("DPO-C&M", "bare", 1.03, True),
    "Poly-DPO / bare loop": ("Poly-DPO", "bare", 1.03, True),
    "precomputed / live reference": ("precomputed reference", "Diffusion-DPO", 0.72, True),
    "precomputed / bare without reference": ("precomputed reference", "bare, no reference", 1.03, True),
    "split / both arms at once, time": ("split arms", "Diffusion-DPO", None, True),
    "peer on the fly / ours cached": ("peer", "Diffusion-DPO", 1.25, False),
    "peer on the fly / ours precomputed": ("peer", "precomputed reference", 1.8, False),
}


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=UNETS, default="41M", help="default: %(default)s")
    parser.add_argument("--latent-size", type=int, default=16, help="a side; 64 for 512 px (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="per step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each variant; the first is not counted")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--output", type=Path, default=Path("step_time.json"), help="default: %(default)s")
    return parser


def make_pipeline(options: argparse.Namespace) -> StableDiffusionPipeline:
    """A Stable Diffusion with random weights; the same ones each time."""
    torch.manual_seed(0)
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS[options.unet],
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=VAE_CHANNELS[options.unet],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
    )
    unet = UNet2DConditionModel(sample_size=options.latent_size, cross_attention_dim=TEXT_WIDTH, **UNETS[options.unet])
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(options.device)


def make_lora() -> LoraConfig:
    """The LoRA that every variant trains."""
    return LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def make_pairs(options: argparse.Namespace, *, of_images: bool) -> datasets.Dataset:
    """One batch of random pairs."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.pairs)]
    generator = np.random.default_rng(0)
    if of_images:
        side = SPATIAL_MULTIPLE * options.latent_size
        draw = lambda: Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))  # noqa: E731
        rows = {"chosen": [draw() for _ in prompts], "rejected": [draw() for _ in prompts]}
        return datasets.Dataset.from_dict({"prompt": prompts, **rows})
    shape = (4, options.latent_size, options.latent_size)
    arms = {
        f"{arm}_latents": generator.standard_normal((len(prompts), *shape)).tolist() for arm in ("chosen", "rejected")
    }
    return datasets.Dataset.from_dict({"prompt": prompts, **arms})


class TrainerStep:
    """A step of one of this library's trainers, on one batch again and again."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path):
        method, settings = TRAINERS[name]
        config_class, trainer_class = method_classes(method)
        of_images = name == "images encoded in the step"
        self.trainer = trainer_class(
            make_pipeline(options),
            args=config_class(
                str(folder / name),
                max_steps=1000,
                per_device_train_batch_size=options.pairs,
                lr_scheduler_type="constant",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=options.device == "cpu",
                resolution=SPATIAL_MULTIPLE * options.latent_size,
                report_to=[],
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=make_pairs(options, of_images=of_images),
            peft_config=make_lora(),
        )
        trainer = self.trainer
        trainer.create_optimizer_and_scheduler(1000)
        trainer.model_wrapped = trainer.model = trainer.accelerator.prepare_model(trainer.model)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # set by `train()`
        (self.batch,) = trainer.get_train_dataloader()

    def __call__(self) -> None:
        """Forward, backward, clip, update."""
        trainer = self.trainer
        trainer.training_step(trainer.model, dict(self.batch))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()


class BareStep:
    """The same passes without a library, or a peer's.

    Args:
        with_reference: Whether the reference passes the network too.
        as_peer: Encode images and prompts in the step, and each arm in a pass of its own.
    """

    def __init__(self, options: argparse.Namespace, *, with_reference: bool = True, as_peer: bool = False):
        self.pipeline = make_pipeline(options)
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.unet):
            part.requires_grad_(False)
        self.model = get_peft_model(self.pipeline.unet, make_lora())
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.with_reference, self.as_peer = with_reference, as_peer
        self.alphas_cumprod = self.pipeline.scheduler.alphas_cumprod.to(options.device)
        self.device, self.pairs = options.device, options.pairs
        side = SPATIAL_MULTIPLE * options.latent_size
        self.pixels = torch.rand(2 * options.pairs, 3, side, side, device=self.device) * 2 - 1
        self.latents = torch.randn(2 * options.pairs, 4, options.latent_size, options.latent_size, device=self.device)
        self.prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.pairs)]
        with torch.no_grad():
            self.embeddings = self._encode_prompts()

    def _encode_prompts(self) -> torch.Tensor:
        return self.pipeline.encode_prompt(self.prompts, self.device, 1, False)[0].repeat(2, 1, 1)

    def __call__(self) -> None:
        """Forward, backward, clip, update."""
        latents, embeddings = self.latents, self.embeddings
        if self.as_peer:
            with torch.no_grad():
                latents = self.pipeline.vae.encode(self.pixels).latent_dist.sample() * 0.18215
                embeddings = self._encode_prompts()
        timestep = torch.randint(1000, (self.pairs,), device=self.device).repeat(2)
        noise = torch.randn_like(latents[: self.pairs]).repeat(2, 1, 1, 1)
        alpha = self.alphas_cumprod[timestep][:, None, None, None]
        inputs = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timestep, embeddings)
        ref_errors = torch.ones(2 * self.pairs, device=self.device)
        if self.with_reference:
            with torch.no_grad(), self.model.disable_adapter():
                ref_errors = self._errors(inputs, noise)
        errors = self._errors(inputs, noise)
        chosen, rejected = ((ref_errors - errors) / 2).chunk(2)
        loss = -logsigmoid(5000 * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _errors(self, inputs: tuple[torch.Tensor, ...], noise: torch.Tensor) -> torch.Tensor:
        if not self.as_peer:
            return (self.model(*inputs).sample - noise).square().mean((1, 2, 3))
        arms = zip(*(tensor.chunk(2) for tensor in inputs), noise.chunk(2), strict=True)
        return torch.cat([(self.model(*arm).sample - target).square().mean((1, 2, 3)) for *arm, target in arms])


def measure(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, in turns; processor seconds on a CPU, where others may be at work."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return {name: values[1:] for name, values in seconds.items()}


def activation_bytes(step: TrainerStep, device: str) -> int:
    """What one step keeps for its backward pass, at the peak: saved tensors but weights; on CUDA the allocator's."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    weights = {parameter.untyped_storage().data_ptr() for parameter in step.trainer.model.parameters()}
    alive: dict[int, list[int]] = {}
    total, peak = 0, 0

    class Held:
        """One saved tensor; forgotten when autograd lets go of it."""

        def __init__(self, tensor: torch.Tensor):
            nonlocal total, peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key = storage.data_ptr()
            entry = alive.setdefault(self.key, [0, storage.nbytes()])
            total += entry[1] if entry[0] == 0 else 0
            entry[0] += 1
            peak = max(peak, total)

        def __del__(self):
            nonlocal total
            entry = alive[self.key]
            entry[0] -= 1
            if entry[0] == 0:
                total -= alive.pop(self.key)[1]

    def pack(tensor: torch.Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in weights else Held(tensor)

    def unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        step()
    return peak


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and write."""
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reference_bank.reference_folder = lambda: folder / "banks"
        bare = BareStep(options)
        trainers = {name: TrainerStep(name, options, folder) for name in TRAINERS}
        steps: dict[str, Callable[[], None]] = {
            "bare": bare,
            "bare, no reference": BareStep(options, with_reference=False),
            "peer": BareStep(options, as_peer=True),
            **trainers,
        }
        seconds = measure(steps, options.rounds, options.device)
        memory = {name: activation_bytes(trainers[name], options.device) for name in ("Diffusion-DPO", "split arms")}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: {"ratio": medians[over] / medians[under], "target": target, "below": below}
        for name, (over, under, target, below) in RATIOS.items()
    }
    share = memory["split arms"] / memory["Diffusion-DPO"]
    ratios["split / both arms at once, activations"] = {"ratio": share, "target": 0.60, "below": True}
    result = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "unet_parameters": sum(p.numel() for n, p in bare.model.named_parameters() if "lora_" not in n),
        "seconds": seconds,
        "activation_bytes": memory,
        "ratios": ratios,
        "environment": environment(),
    }
    _print(result, medians)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _print(result: dict[str, Any], medians: dict[str, float]) -> None:
    print(f"U-Net of {result['unet_parameters'] / 1e6:.1f} M parameters; seconds a step, median and range")
    for name, values in result["seconds"].items():
        print(f"  {name:<28}{medians[name]:8.3f}  ({min(values):.3f} .. {max(values):.3f})")
    print("ratios")
    for name, entry in result["ratios"].items():
        verdict = ""
        if entry["target"] is not None:
            is_met = (entry["ratio"] <= entry["target"]) == entry["below"]
            verdict = f"  target {'<=' if entry['below'] else '>='} {entry['target']}: {'met' if is_met else 'MISSED'}"
        print(f"  {name:<42}{entry['ratio']:6.3f}{verdict}")


if __name__ == "__main__":
    main(make_parser().parse_args())
