# SPDX-License-Identifier: Apache-2.0
"""Tiny real training runs of a language model: pairs of completions, and trainers over them."""

from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig

from tests.tiny.language_model import tiny_language_model, tiny_tokenizer
from trl_sipo import SIPOConfig, SIPOTrainer

ROWS = (
    ("the cat", " sat on a mat", " ran to a mat"),
    ("a small dog", " ran to it in the rain", " sat"),
    ("a cat", " sat in the rain", " sat on a dog and a cat"),
    ("the red mat", " sat", " ran in the rain and on a mat"),
)

# Of the policy that wrote the completions above. The weights of the tiny model's pairs are then about 2, 0.9, 0.6
# and 0.2.
CHOSEN = [-33.0, -45.0, -29.0, -8.0]
REJECTED = [-32.5, -13.0, -48.0, -54.0]


def text_pairs(count: int = 8, **columns: list[Any]) -> datasets.Dataset:
    """`count` rows of prompt, chosen and rejected, of several lengths; with further columns."""
    rows = [ROWS[index % len(ROWS)] for index in range(count)]
    named = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))
    return datasets.Dataset.from_dict({**named, **columns})


def recorded_pairs(chosen: list[Any] = CHOSEN, rejected: list[Any] = REJECTED) -> datasets.Dataset:
    """Four rows with the log-probabilities of a policy that wrote them."""
    return text_pairs(4, chosen_logps=chosen, rejected_logps=rejected)


def make_text_config(output: Path | str, config_class: type = SIPOConfig, **options: Any) -> Any:
    """A configuration for a few float32 steps on the CPU."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return config_class(str(output), **{**defaults, **options})


def make_text_trainer(
    output: Path | str,
    *,
    is_lora: bool = True,
    pairs: Any = None,
    trainer_class: type = SIPOTrainer,
    config_class: type = SIPOConfig,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of the tiny language model, with a new LoRA or all weights; the reference is the same model."""
    lora = {"peft_config": LoraConfig(r=4, lora_alpha=10, target_modules="all-linear")}
    return trainer_class(
        tiny_language_model(),
        args=make_text_config(output, config_class, **options),
        train_dataset=text_pairs() if pairs is None else pairs,
        processing_class=tiny_tokenizer(),
        **{**(lora if is_lora else {"ref_model": tiny_language_model()}), **(trainer_options or {})},
    )


def disturb(model: torch.nn.Module, scale: float = 0.1) -> None:
    """Move the trained weights at random, the same for models with the same ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def batch_of(trainer: Any, rows: range) -> dict[str, Any]:
    """The batch that the trainer's collator makes of these rows."""
    return trainer.data_collator([trainer.train_dataset[index] for index in rows])


def loss_and_gradient(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of the mean over a batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }


def train_text(output: Path, kind: str, batch_size: int) -> None:
    """An evaluation and three steps on four pairs each, and the first process writes weights and log."""
    pairs = recorded_pairs() if kind == "recorded" else text_pairs(12)
    trainer = make_text_trainer(
        output, is_lora=kind != "full", pairs=pairs, per_device_train_batch_size=batch_size, optim="sgd"
    )
    metrics = trainer.evaluate(pairs)  # leaves nothing behind, above all no policy that each process trains for itself
    trainer.train()
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        result = {
            "weights": {name: value.detach() for name, value in model.named_parameters()},
            "log": [row for row in trainer.state.log_history if "loss" in row],
            "metrics": metrics,
            "processes": trainer.accelerator.num_processes,
        }
        torch.save(result, output / "result.pt")
    trainer.end()
