# SPDX-License-Identifier: Apache-2.0
"""By what precomputed errors of a reference are found again: all that they depend on, but for the pairs and draws."""

import hashlib
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import FlowSchedule

_FORMAT = 1
_SAMPLED_VALUES = 64
# What the configurations of VAEs call the numbers by which latents are normalised.
_NORMALISATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def reference_key(trainer: Any) -> dict[str, Any]:
    """All that the reference errors depend on, but for the pairs and their draws."""
    args, schedule = trainer.args, trainer.noise_schedule
    names = (
        "embedded_guidance_scale", "frame_rate", "num_frames", "bf16", "fp16",
        # What differs by rounding alone, which beta makes large.
        "tf32", "attention_backend", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    )  # fmt: skip
    process = (
        {"shift": schedule.drawn_shift, "scale": schedule.timestep_scale}
        if isinstance(schedule, FlowSchedule)
        else {"alphas_cumprod": hashlib.blake2b(schedule.alphas_cumprod.numpy().tobytes()).hexdigest()}
    )
    return {
        "format": _FORMAT,
        "pipeline": type(trainer.adapter.pipeline).__name__,
        "prediction_type": trainer.adapter.prediction_type,
        "weights": _hash_of_reference(trainer),
        "encoders": _hash_of_encoders(trainer.adapter),
        "size": list(trainer.size),
        "process": process,
        **{name: getattr(args, name) for name in names},
    }


def _hash_of_reference(trainer: Any) -> str:
    """Of the weights that the reference is made of: without the LoRA in training, with the frozen one, if any."""
    digest = hashlib.blake2b(digest_size=16)
    ref_model = getattr(trainer.reference, "ref_model", None) or trainer.unwrapped_model
    ref_model = trainer.accelerator.unwrap_model(ref_model)
    name_of_reference = getattr(trainer.reference, "adapter_name", None)
    if name_of_reference is not None:  # equal matrices of another alpha are another LoRA
        layers: list[Any] = [module for module in ref_model.modules() if isinstance(module, BaseTunerLayer)]
        digest.update(repr([layer.scaling.get(name_of_reference) for layer in layers]).encode())
    for name, parameter in sorted(ref_model.named_parameters()):
        if "lora_" in name and (name_of_reference is None or f".{name_of_reference}." not in name):
            continue
        # As it is called without PEFT around it: which layers a new LoRA adapts is no part of its reference.
        digest.update(name.removeprefix("base_model.model.").replace(".base_layer.", ".").encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_of_encoders(adapter: BackboneAdapter) -> str:
    """Of VAE and text encoders: the beginning and the precision of every weight, and how latents are normalised."""
    digest = hashlib.blake2b(digest_size=16)
    for module in adapter.frozen_modules():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            beginning = value.detach().flatten()[:_SAMPLED_VALUES].float().cpu()
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(beginning.numpy())
        digest.update(repr([getattr(module.config, name, None) for name in _NORMALISATION]).encode())
    return digest.hexdigest()
