# SPDX-License-Identifier: Apache-2.0
"""What one training step holds and computes, counted on tensors without data.

The denoiser has its configuration and no weights; a real forward and backward pass runs on the meta device, as often
and with as many samples as the trainers would call it.
"""

import re
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from trl_sipo.adapters.wrappers import repeated_blocks, unwrap_denoiser
from trl_sipo.cost.denoiser_inputs import DENOISER_INPUTS, OF_THE_PROMPT, Sample
from trl_sipo.cost.memory_counting import count_inference, count_step
from trl_sipo.cost.models import Model, adapter_class, add_lora, make_denoiser, num_parameters
from trl_sipo.cost.operations import OperationCounter, Operations, from_rows, to_rows
from trl_sipo.cost.passes import forward_loss

NF4_BYTES = 0.5 + 4 / 64  # four bits a weight, and a float32 scale for each block of 64
_LORA_MATRIX = re.compile(r"\.lora_[AB]\.")


@dataclass(frozen=True)
class StepPlan:
    """What of a run's settings decides the cost of one call of the model.

    Attributes:
        pairs: Per device and call (`per_device_train_batch_size`); single images where `arms` is 1.
        arms: Samples of a pair: 2, or 1 of methods that take single images.
        passes: Of the denoiser per sample: 2 with classifier-free guidance in training, else 1.
        has_reference: Whether the reference is computed in the step.
        lora_rank: `None`: all weights are trained.
        lora_targets: Layers of the LoRA; `None`: the model's conventional ones.
        precision: Of the network: "float32", "bfloat16" or "float16".
        frozen_precision: Of the frozen weights under a LoRA.
        is_quantized: Whether these are in four bits.
        checkpointing: Whether blocks are computed again in the backward pass.
        split: Whether the arms pass one after the other (`split_pair_backward`).
        encodes: Whether media are encoded in the step; else latents are at hand.
        holds_encoders: Whether the VAE and the text encoders are in memory, as without a cache.
    """

    pairs: int = 1
    arms: int = 2
    passes: int = 1
    has_reference: bool = True
    lora_rank: int | None = 8
    lora_targets: tuple[str, ...] | str | None = None
    precision: str = "bfloat16"
    frozen_precision: str = "bfloat16"
    is_quantized: bool = False
    checkpointing: bool = True
    split: bool = False
    encodes: bool = False
    holds_encoders: bool = False

    @property
    def samples(self) -> int:
        """In one call of the model."""
        return self.pairs * self.arms * self.passes

    @property
    def weight_precision(self) -> str:
        """Of the weights in memory: those that are trained are float32."""
        return "float32" if self.lora_rank is None else self.frozen_precision


@dataclass(frozen=True)
class StepCounts:
    """What one call of the model holds and computes; bytes unless said otherwise.

    Attributes:
        parameters: Number of the denoiser's own.
        trained: Number of those that have a gradient.
        outside_blocks: Number of those, LoRA included, that belong to none of the repeated blocks.
        largest_block: Number of the largest repeated block.
        weights: Of the frozen denoiser as it is held; of full fine-tuning, of the trained one in float32.
        first_peak: The most beside the weights in a step without accumulation, gradients included.
        later_peak: The most beside weights and gradients when these are there already, as in accumulation.
        reference_peak: The most beside the weights in the reference's pass.
        vae_peak: The most beside its weights while the VAE encodes, if it does in the step.
        vae: Of the VAE's weights, which are float32.
        text_encoders: Of the text encoders' weights.
        text_encoder_parameters: Number of them.
        conditioning: Number of values that a prompt is encoded to.
        latents: Number of values that an image or clip is encoded to.
        policy: Operations of a forward and backward pass.
        reference: Operations of the reference's pass.
        encoding: Operations of the VAE on one image or clip, if it encodes in the step.
    """

    parameters: int
    trained: int
    outside_blocks: int
    largest_block: int
    weights: int
    first_peak: int
    later_peak: int
    reference_peak: int
    vae_peak: int
    vae: int
    text_encoders: int
    text_encoder_parameters: int
    conditioning: int
    latents: int
    policy: Operations
    reference: Operations
    encoding: Operations

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: to_rows(value) if isinstance(value, Counter) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "StepCounts":
        """What [`to_json`] gave."""
        return cls(**{name: from_rows(value) if isinstance(value, list) else value for name, value in plain.items()})


def count(model: Model, plan: StepPlan) -> StepCounts:
    """Count one call of the model, its backward pass, the reference's pass, and the VAE's."""
    architecture, dtype = model.architecture, getattr(torch, plan.weight_precision)
    autocast = None if plan.precision == "float32" else getattr(torch, plan.precision)
    denoiser = make_denoiser(architecture, "meta", dtype)
    parameters = num_parameters(denoiser)
    reference = OperationCounter()
    options = {"architecture": architecture, "device": "meta", "dtype": dtype, "samples": plan.samples}
    # On the base, as a LoRA that is switched off computes nothing.
    reference_peak = count_inference(denoiser, forward_loss(denoiser, **options), autocast, reference)
    if plan.lora_rank is not None:
        denoiser = add_lora(denoiser, _targets(model, plan), plan.lora_rank)
    denoiser.train()
    if plan.checkpointing:
        unwrap_denoiser(denoiser).enable_gradient_checkpointing()
    loss, policy = forward_loss(denoiser, split=plan.split and plan.arms == 2, **options), OperationCounter()
    first = count_step(denoiser, loss, autocast, policy)["peak"]
    later = count_step(denoiser, loss, autocast)["peak"]
    vae_peak, encoding = _count_encoding(model, plan) if plan.encodes else (0, Counter())
    trained = sum(parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad)
    blocks = _block_sizes(denoiser)
    return StepCounts(
        parameters=parameters,
        trained=trained,
        outside_blocks=num_parameters(denoiser) - sum(blocks),
        largest_block=max(blocks, default=parameters),
        weights=_weight_bytes(denoiser, plan) * model.num_denoisers,
        first_peak=first,
        later_peak=later,
        reference_peak=reference_peak if plan.has_reference else 0,
        vae_peak=vae_peak,
        vae=4 * num_parameters(model.vae),
        text_encoders=dtype.itemsize * num_parameters(*model.text_encoders),
        text_encoder_parameters=num_parameters(*model.text_encoders),
        conditioning=_conditioning_numbers(model, denoiser),
        latents=torch.Size(architecture.latents).numel(),
        policy=policy.operations,
        reference=reference.operations,
        encoding=encoding,
    )


def _targets(model: Model, plan: StepPlan) -> list[str] | str:
    given = model.lora_targets if plan.lora_targets is None else plan.lora_targets
    return given if isinstance(given, str) else list(given)


def _count_encoding(model: Model, plan: StepPlan) -> tuple[int, Operations]:
    """Bytes at the VAE's peak, and its operations on one image or clip, in float32."""
    height, width, frames = model.architecture.size
    shape = (3, height, width) if len(model.architecture.latents) == 3 else (3, frames, height, width)
    at_a_time = min(plan.pairs * plan.arms, adapter_class(model.architecture.pipeline).vae_slice_size)
    one = OperationCounter()
    peak = count_inference(model.vae, partial(_encode, model.vae, torch.empty(1, *shape, device="meta")), None, one)
    if at_a_time > 1:
        pixels = torch.empty(at_a_time, *shape, device="meta")
        peak = count_inference(model.vae, partial(_encode, model.vae, pixels))
    return peak, one.operations


def _encode(vae: Any, pixels: torch.Tensor) -> None:
    with torch.device("meta"):
        vae.encode(pixels)


def _weight_bytes(denoiser: nn.Module, plan: StepPlan) -> int:
    """Of the denoiser without its LoRA, buffers included; of four bits with one layer at a time in 16."""
    own = [tensor for name, tensor in denoiser.named_parameters() if not _LORA_MATRIX.search(name)]
    held = sum(tensor.nbytes for tensor in [*own, *denoiser.buffers()])
    if not plan.is_quantized:
        return held
    linear = [
        layer.weight
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear) and not _LORA_MATRIX.search(f".{name}.")
    ]
    quantized = sum(weight.numel() for weight in linear)
    largest = max(weight.nbytes for weight in linear)
    return round(NF4_BYTES * quantized) + held - sum(weight.nbytes for weight in linear) + largest


def _block_sizes(denoiser: nn.Module) -> list[int]:
    """Numbers of parameters of the repeated blocks, LoRA included, which FSDP2 puts together one by one."""
    names = repeated_blocks(denoiser)
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    return [num_parameters(block) for block in blocks if id(block) not in inside]


def _conditioning_numbers(model: Model, denoiser: nn.Module) -> int:
    """Values that the denoiser is given of one prompt, at its full length."""
    architecture = model.architecture
    sample = Sample(1, architecture.latents, architecture.text_tokens, "meta", torch.float32)
    with torch.device("meta"):
        inputs = DENOISER_INPUTS[architecture.denoiser](sample, unwrap_denoiser(denoiser).config)
    inputs = {**inputs, **inputs.get("added_cond_kwargs", {})}
    return sum(leaf.numel() for name in OF_THE_PROMPT for leaf in tree_leaves(inputs.get(name)) if leaf is not None)
