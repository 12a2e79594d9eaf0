# SPDX-License-Identifier: Apache-2.0
"""By what precomputed errors of a reference are found again: all that they depend on, but for the pairs and draws."""

import hashlib
from typing import Any

import torch

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import FlowSchedule

_FORMAT = 1
_SAMPLED_VALUES = 64


def reference_key(trainer: Any) -> dict[str, Any]:
    """All that the reference errors depend on, but for the pairs and the number of draws."""
    args, schedule = trainer.args, trainer.noise_schedule
    names = (
        "seed", "timestep_sampling", "timestep_range", "logit_mean", "logit_std", "timesteps", "share_noise",
        "caption_dropout", "embedded_guidance_scale", "frame_rate", "num_frames", "eval_noise_seed", "bf16", "fp16",
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
    name_of_reference = getattr(trainer.reference, "adapter_name", None)
    for name, parameter in sorted(trainer.accelerator.unwrap_model(ref_model).named_parameters()):
        if "lora_" in name and (name_of_reference is None or f".{name_of_reference}." not in name):
            continue
        # As it is called without PEFT around it: which layers a new LoRA adapts is no part of its reference.
        digest.update(name.removeprefix("base_model.model.").replace(".base_layer.", ".").encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_of_encoders(adapter: BackboneAdapter) -> str:
    """Of the beginning of every weight of the VAE and the text encoders, on which latents and conditioning depend."""
    digest = hashlib.blake2b(digest_size=16)
    for module in adapter.frozen_modules():
        for name, parameter in module.named_parameters():
            beginning = parameter.detach().flatten()[:_SAMPLED_VALUES].float().cpu()
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(beginning.numpy())
    return digest.hexdigest()
