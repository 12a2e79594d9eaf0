# SPDX-License-Identifier: Apache-2.0
"""How much memory a LoRA step on one pair needs, for each real architecture.

    python benchmarks/memory.py                                      # computed without a GPU, in some minutes
    python benchmarks/memory.py --device cuda --model "FLUX.1-dev"   # and measured, where the GPU is large enough

The denoisers have their published configurations and random weights, so nothing is downloaded. What is computed runs a
forward and a backward pass on tensors without data (`trl_sipo/cost/memory_counting.py`). Prints two tables and writes
JSON.
"""

import argparse
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl_sipo.cost.architectures import ARCHITECTURES, Architecture
from trl_sipo.cost.memory_counting import LiveBytes, count_step
from trl_sipo.cost.models import adapter_class, add_lora, frozen_module, make_denoiser, num_parameters
from trl_sipo.cost.passes import PAIR, forward_loss
from trl_sipo.scripts.env import environment

CARDS = (24, 40, 80)  # GiB
RESERVE = 2.0  # GiB of a card for the CUDA context, the libraries' workspaces and fragmentation
NF4_BYTES = 0.5 + 4 / 64  # four bits a weight, and a float32 scale for each block of 64
ADAMW_BYTES = {"adamw": 8, "adamw_8bit": 2}  # two moments a parameter

# How a step goes -> (blocks are checkpointed, the arms pass one after the other: `split_pair_backward`).
STEPS = {
    "plain": (False, False),
    "split": (False, True),
    "checkpointing": (True, False),
    "checkpointing and split": (True, True),
}
# Name -> (weights, step, optimizer); those with a plus add one saving to the one before.
VARIANTS: dict[str, tuple[str, str, str]] = {
    "LoRA": ("bf16", "plain", "adamw"),
    "split arms": ("bf16", "split", "adamw"),
    "checkpointing": ("bf16", "checkpointing", "adamw"),
    "+ 8-bit AdamW": ("bf16", "checkpointing", "adamw_8bit"),
    "+ QLoRA": ("nf4", "checkpointing", "adamw_8bit"),
    "+ split arms": ("nf4", "checkpointing and split", "adamw_8bit"),
}
MEASURED = ("LoRA", "split arms", "checkpointing")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--device", choices=["meta", "cuda"], default="meta", help="cuda measures as well")
    parser.add_argument("--output", type=Path, default=Path("memory.json"), help="default: %(default)s")
    return parser


# ------------------------------------------------------------------------------------------------------- one LoRA step


def build(architecture: Architecture, device: str, dtype: torch.dtype, rank: int) -> nn.Module:
    """The denoiser with random weights, and a LoRA in the adapter's default layers; its matrices are float32."""
    targets = adapter_class(architecture.pipeline).lora_target_modules
    denoiser = make_denoiser(architecture, device, dtype)
    return add_lora(denoiser, targets if isinstance(targets, str) else list(targets), rank).train()


def compute(
    architecture: Architecture, rank: int, dtype: torch.dtype = torch.bfloat16, *, autocast: bool = True
) -> dict[str, Any]:
    """Count parameters and bytes of a step, without weights.

    Args:
        architecture: The model.
        rank: Of the LoRA.
        dtype: Of the frozen weights.
        autocast: As a trainer with `bf16=True` on CUDA.
    """
    model = build(architecture, "meta", dtype, rank)
    steps = {}
    for name, (checkpointing, split) in STEPS.items():
        if checkpointing:
            model.get_base_model().enable_gradient_checkpointing()
        loss = forward_loss(model, architecture, "meta", dtype, split=split)
        steps[name] = count_step(model, loss, dtype if autocast else None)
        model.zero_grad()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lora = sum(parameter.numel() for parameter in trained)
    own = sum(parameter.numel() for parameter in model.parameters()) - lora
    quantized = [layer.weight.numel() for layer in frozen_linear_layers(model)]
    held = own + sum(buffer.numel() for buffer in model.buffers())  # tables of positions, loaded in the same dtype
    width = dtype.itemsize
    return {
        "parameters": own,
        "lora_parameters": lora,
        "weights": {
            "bf16": width * held,
            # One layer's weights at a time exist in bfloat16.
            "nf4": round(NF4_BYTES * sum(quantized)) + width * (held - sum(quantized) + max(quantized)),
        },
        "lora": sum(parameter.nbytes for parameter in trained),
        "optimizer": {name: size * lora for name, size in ADAMW_BYTES.items()},
        "steps": steps,
        "frozen": {name: 2 * frozen_parameters(name) for name in architecture.frozen},
    }


def frozen_linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that bitsandbytes would quantize: all but those of the LoRA."""
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not re.search(r"\.lora_[AB]\.", name)
    ]


def frozen_parameters(name: str) -> int:
    """Number of parameters of a VAE or text encoder."""
    return num_parameters(frozen_module(name))


def total(counts: dict[str, Any], variant: str) -> int:
    """Bytes at the peak of a step: weights, LoRA, optimizer, and what the forward and backward passes make."""
    weights, step, optimizer = VARIANTS[variant]
    return counts["weights"][weights] + counts["lora"] + counts["optimizer"][optimizer] + counts["steps"][step]["peak"]


def measure(
    architecture: Architecture, rank: int, device: str, dtype: torch.dtype = torch.bfloat16, *, step: str
) -> int:
    """Peak bytes of two real training steps (the second has the optimizer's moments), everything included.

    On CUDA those of its allocator, under autocast to bfloat16; on a CPU those that operations made.
    """
    is_cuda = device == "cuda"
    checkpointing, split = STEPS[step]
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with nullcontext() if is_cuda else LiveBytes() as live:
        model = build(architecture, device, dtype, rank)
        if checkpointing:
            model.get_base_model().enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        loss = forward_loss(model, architecture, device, dtype, split=split)
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16, enabled=is_cuda):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() if is_cuda else live.peak


# ------------------------------------------------------------------------------------------------------------- tables


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.1f}"


def parts_table(models: dict[str, dict[str, Any]]) -> str:
    """Markdown: what a step is made of, in GiB."""
    lines = [
        "| model | size | parameters | LoRA | weights bf16 / NF4 | kept for backward | with split arms | "
        "with checkpointing | with both | VAE and encoders |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, counts in models.items():
        height, width, frames = ARCHITECTURES[name].size
        kept = " | ".join(gib(counts["steps"][step]["saved"]) for step in STEPS)
        lines.append(
            f"| {name} | {width}x{height}{f'x{frames}' if frames > 1 else ''} | {counts['parameters'] / 1e9:.2f} B | "
            f"{counts['lora_parameters'] / 1e6:.1f} M | {gib(counts['weights']['bf16'])} / "
            f"{gib(counts['weights']['nf4'])} | {kept} | {gib(sum(counts['frozen'].values()))} |"
        )
    return "\n".join(lines)


def totals_table(models: dict[str, dict[str, Any]]) -> str:
    """Markdown: the peak of a step with each variant, in GiB, and the first variant that fits each card."""
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lines = [f"| model | {' | '.join(VARIANTS)} | {cards} |", "|---" * (1 + len(VARIANTS) + len(CARDS)) + "|"]
    for name, counts in models.items():
        peaks = " | ".join(gib(total(counts, variant)) for variant in VARIANTS)
        lines.append(f"| {name} | {peaks} | {' | '.join(best_fit(counts, card) for card in CARDS)} |")
    return "\n".join(lines)


def best_fit(counts: dict[str, Any], card: int) -> str:
    """The first of `VARIANTS` that a card holds beside VAE and encoders; in brackets, without them, if it differs."""
    room = (card - RESERVE) * 2**30
    frozen = sum(counts["frozen"].values())
    beside, alone = (
        next((variant for variant in VARIANTS if total(counts, variant) + more <= room), "no") for more in (frozen, 0)
    )
    return beside if beside == alone else f"{beside} ({alone})"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Compute, measure on CUDA, print and write; returns what was written."""
    options = make_parser().parse_args(argv)
    models: dict[str, dict[str, Any]] = {}
    for name in options.model:
        counts = compute(ARCHITECTURES[name], options.rank)
        counts["computed"] = {variant: total(counts, variant) for variant in VARIANTS}
        counts["measured"] = {}
        if options.device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            for variant in MEASURED:
                if counts["computed"][variant] < free - RESERVE * 2**30:
                    measured = measure(ARCHITECTURES[name], options.rank, "cuda", step=VARIANTS[variant][1])
                    counts["measured"][variant] = measured
        models[name] = counts
        print(f"{name}: " + ", ".join(f"{key} {gib(value)}" for key, value in counts["computed"].items()), flush=True)
        for variant, size in counts["measured"].items():
            print(f"  measured: {variant} {gib(size)}")
    result = {
        "settings": {"rank": options.rank, "samples": PAIR, "reserve_gib": RESERVE},
        "environment": {
            **{name: version for name, version in environment().items() if name != "platform"},
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        },
        "models": models,
    }
    print(f"\nComputed, in GiB:\n\n{parts_table(models)}\n\n{totals_table(models)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
