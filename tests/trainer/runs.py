# SPDX-License-Identifier: Apache-2.0
"""Tiny real training runs: the methods as one table, a dataset of pictures, and a trainer over a tiny pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image

from tests.tiny_models import tiny_stable_diffusion
from trl_sipo import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionPolyDPOConfig,
    DiffusionPolyDPOTrainer,
    DiffusionSIPOConfig,
    DiffusionSIPOTrainer,
)
from trl_sipo.core.objectives import diffusion_dpo_loss, dpo_cm_loss, poly_dpo_loss, sipo_loss

LORA_RANK, LORA_ALPHA = 4, 10  # different, so that a lost alpha shows
PROMPTS = ("a red cat", "two dogs", "a boat at sea", "a house")


@dataclass(frozen=True)
class Method:
    """One trainer, and the public function that its per-pair loss must equal."""

    name: str
    trainer_class: type
    config_class: type
    options: dict[str, Any] = field(default_factory=dict)
    loss: Callable[..., torch.Tensor] = diffusion_dpo_loss
    loss_options: dict[str, Any] = field(default_factory=dict)
    is_weighted: bool = False
    fresh_loss: Callable[[float], float] = lambda ln2: ln2
    """Loss of an unmasked pair of a fresh model, from ln 2."""


METHODS = (
    Method("dpo", DiffusionDPOTrainer, DiffusionDPOConfig),
    Method(
        "sipo",
        DiffusionSIPOTrainer,
        DiffusionSIPOConfig,
        loss=sipo_loss,
        loss_options={"clip_range": 0.1},
        is_weighted=True,
    ),
    Method(
        "dpo_cm",
        DiffusionSIPOTrainer,
        DiffusionSIPOConfig,
        options={"objective": "dpo_cm", "mask_threshold": 0.5, "clip_range": 0.2},
        loss=dpo_cm_loss,
        loss_options={"clip_range": 0.2, "mask_threshold": 0.5},
        is_weighted=True,
    ),
    Method(
        "poly_dpo",
        DiffusionPolyDPOTrainer,
        DiffusionPolyDPOConfig,
        options={"poly_alpha": 8.0},
        loss=poly_dpo_loss,
        loss_options={"alpha": 8.0},
        fresh_loss=lambda ln2: ln2 + 8.0 / 2,
    ),
)
DPO, SIPO, DPO_CM, POLY_DPO = METHODS


def picture(seed: int, width: int = 32) -> Image.Image:
    """A smooth random picture, `width` x 32."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, 32), Image.Resampling.BICUBIC)


def preference_pairs(count: int = 8, seed: int = 0, width: int = 32) -> datasets.Dataset:
    """`count` rows of prompt, chosen, rejected."""
    return datasets.Dataset.from_dict(
        {
            "prompt": [PROMPTS[i % len(PROMPTS)] for i in range(count)],
            "chosen": [picture(1000 * seed + 2 * i, width) for i in range(count)],
            "rejected": [picture(1000 * seed + 2 * i + 1, width) for i in range(count)],
        },
        features=datasets.Features(
            {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
        ),
    )


def lora(**options: Any) -> LoraConfig:
    """A LoRA whose alpha is not its rank."""
    return LoraConfig(**{"r": LORA_RANK, "lora_alpha": LORA_ALPHA, **options})


def make_config(method: Method, output_dir: Path | str, **options: Any) -> Any:
    """The method's configuration for a few float32 steps on the CPU."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "eval_noise_levels": 3,
        "gradient_checkpointing": False,
    }
    return method.config_class(str(output_dir), **{**defaults, **method.options, **options})


def make_trainer(
    method: Method,
    output_dir: Path | str,
    *,
    model: DiffusionPipeline | str | None = None,
    is_lora: bool = True,
    pairs: Any = None,
    trainer_class: type | None = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of `method` on the tiny Stable Diffusion, with a new LoRA or (`is_lora=False`) all weights."""
    arguments = {"peft_config": lora()} if is_lora else {}
    return (trainer_class or method.trainer_class)(
        tiny_stable_diffusion() if model is None else model,
        args=make_config(method, output_dir, **options),
        train_dataset=preference_pairs() if pairs is None else pairs,
        **{**arguments, **(trainer_options or {})},
    )


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names whose values differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def trained_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained parameters, in order."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all weights together."""
    assert left.keys() == right.keys()
    difference = sum(float((left[name] - right[name]).double().pow(2).sum()) for name in left)
    return (difference / sum(float(value.double().pow(2).sum()) for value in left.values())) ** 0.5


def logged(trainer: Any, key: str) -> list[float]:
    """The values logged under `key`, in order."""
    return [row[key] for row in trainer.state.log_history if key in row]


def predict(pipeline: DiffusionPipeline, seed: int = 3) -> torch.Tensor:
    """What the pipeline's denoiser says to fixed noisy latents and prompts."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = pipeline.encode_prompt(list(PROMPTS[:2]), "cpu", 1, False)[0]
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    pipeline.unet.eval()
    with torch.no_grad():
        return pipeline.unet(latents, torch.tensor([100, 700]), encoder_hidden_states=embeddings).sample


def collate_first(trainer: Any, count: int = 4) -> dict[str, Any]:
    """The first pairs of the training data as a batch."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])
