# SPDX-License-Identifier: Apache-2.0
"""The training of one round, from the policy of the round before, compared with the base or with that policy."""

import gc
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from trl_sipo.adapters import load_pipeline
from trl_sipo.errors import ConfigurationError
from trl_sipo.generation.models import ModelSpec, apply_lora
from trl_sipo.online.config import OnlineConfig
from trl_sipo.online.pairs import TRAINING, round_seed
from trl_sipo.online.stopping import trainer_takes_sigterm
from trl_sipo.trainer.methods import method_classes

RUN_FOLDER, MODEL_FOLDER = "run", "model"
_REPORTED = (
    "loss", "rewards/accuracies", "rewards/margins", "drift/chosen_error", "proximal/distance", "sipo/masked_fraction",
)  # fmt: skip


def policy_spec(config: OnlineConfig, name: str, trained: Path | None) -> ModelSpec:
    """A policy to sample with: the base, or what a round's training saved."""
    if trained is None:
        return ModelSpec(name, config.model)
    return ModelSpec(name, config.model, str(trained)) if config.lora is not None else ModelSpec(name, str(trained))


def lora_config(config: OnlineConfig) -> LoraConfig | None:
    """The LoRA of the first round, or None for all weights.

    Raises:
        ConfigurationError: An option that PEFT does not have, or a size that is none.
    """
    if config.lora is None:
        return None
    for name, kind in (("r", (int,)), ("lora_alpha", (int, float))):  # PEFT looks when the samples have been drawn
        value = config.lora.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
            raise ConfigurationError(f"`lora.{name}` must be a positive number, got {value!r}.")
    try:
        return LoraConfig(**{"init_lora_weights": "gaussian", **config.lora})
    except TypeError as error:
        raise ConfigurationError(f"`lora`: {error}. Its settings are those of peft.LoraConfig.") from error


def train_round(
    config: OnlineConfig, number: int, rows: Dataset, previous: Path | None, folder: Path
) -> list[dict[str, Any]]:
    """Train a round's policy, or go on with that, and save it; every process of the run must call it.

    Args:
        rows: The pairs.
        previous: What the round before saved; None in the first.
        folder: Of the round: checkpoints go to `run`, the policy to `model`.

    Returns:
        What was logged, a row for each `logging_steps`.

    Raises:
        Preempted: SIGTERM came. The trainer has saved itself.
    """
    trainer = _make_trainer(config, number, rows, previous, folder / RUN_FOLDER)
    with trainer_takes_sigterm():
        trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(str(folder / MODEL_FOLDER))
    log = [
        {name: row[name] for name in ("step", *_REPORTED) if name in row}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    del trainer
    free_memory()
    return log


def _make_trainer(config: OnlineConfig, number: int, rows: Dataset, previous: Path | None, run: Path) -> Any:
    is_fixed = config.reference == "fixed"
    args = config.training_arguments(
        run, round_seed(config, number, TRAINING), lora_reference="base" if is_fixed else "copy"
    )
    peft_config = ref_model = None
    if config.lora is not None:
        pipeline: Any = _load(config.model, config.dtype)
        if previous is None:
            peft_config = lora_config(config)
        else:
            apply_lora(pipeline, previous)
    else:
        pipeline = _load(config.model if previous is None else previous, "float32")
        # Of the first round, the base is where the policy starts: a frozen copy is it.
        if is_fixed and previous is not None and args.has_reference:
            ref_model = config.model
    return method_classes(config.method)[1](
        pipeline, ref_model, args=args, train_dataset=rows, peft_config=peft_config
    )


def _load(name: str | Path, dtype: str) -> Any:
    return load_pipeline(name, dtype={"default": getattr(torch, dtype), "vae": torch.float32})


def free_memory() -> None:
    """Give back what a model held that nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
