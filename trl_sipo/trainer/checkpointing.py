# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds besides the trainer's own state: a LoRA, or a whole pipeline, and a moving reference."""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.level_memory import LEVEL_MEMORY_FILE

logger = logging.getLogger(__name__)

REFERENCE_FOLDER = "reference"
STREAM_POSITION_FILE = "stream_position.json"
# Files by which a run continues; they are no part of the model.
_TRAINER_STATE = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin",
    REFERENCE_FOLDER, STREAM_POSITION_FILE, LEVEL_MEMORY_FILE, "README.md",
)  # fmt: skip


def save_weights(adapter: BackboneAdapter, model: nn.Module, directory: str) -> None:
    """A LoRA as `pipe.load_lora_weights` reads it, or a whole pipeline as `from_pretrained` reads it."""
    if isinstance(model, PeftModel):
        adapter.save_lora(model, directory)
    else:
        adapter.save_pipeline(directory)


def load_weights(adapter: BackboneAdapter, model: nn.Module, directory: str) -> None:
    """Restore, in place, what `save_weights` wrote.

    Raises:
        BackboneError: The folder holds no such weights, or those of another model.
    """
    if isinstance(model, PeftModel):
        adapter.load_lora(model, directory)
    else:
        adapter.load_denoiser(model, directory)


def load_reference(adapter: BackboneAdapter, ref_model: nn.Module, checkpoint: str) -> None:
    """Restore a reference that `sync_ref_model` had moved.

    Raises:
        ConfigurationError: The checkpoint has none.
    """
    folder = Path(checkpoint, REFERENCE_FOLDER)
    if not folder.is_dir():
        raise ConfigurationError(
            f"`sync_ref_model=True` moves the reference while training, but the checkpoint {checkpoint!r} has none: "
            "it was written without that setting. Resume with `sync_ref_model=False`, or start anew."
        )
    adapter.load_denoiser(ref_model, folder)


def copy_weights(checkpoint: str, output_dir: str) -> None:
    """Copy the model's files out of a checkpoint, so that the folder above it can be pushed as a model."""
    ignored = shutil.ignore_patterns(*_TRAINER_STATE)
    shutil.copytree(checkpoint, output_dir, ignore=ignored, dirs_exist_ok=True)


@dataclass(frozen=True)
class StreamPosition:
    """Where a run is in a stream.

    Attributes:
        epoch: Passes that have ended.
        steps: Optimiser steps of the pass that has begun.
    """

    epoch: int
    steps: int


def save_stream_position(position: StreamPosition, checkpoint: Path) -> None:
    """Write the position into a checkpoint."""
    if checkpoint.is_dir():
        (checkpoint / STREAM_POSITION_FILE).write_text(json.dumps(asdict(position)), encoding="utf-8")


def load_stream_position(checkpoint: str) -> StreamPosition | None:
    """The position that a checkpoint holds; warns, and gives `None`, when it has none."""
    file = Path(checkpoint, STREAM_POSITION_FILE)
    if file.is_file():
        return StreamPosition(**json.loads(file.read_text(encoding="utf-8")))
    logger.warning(
        "The checkpoint %s does not say where it was in the stream: rows are skipped as in a first pass, so the order "
        "of the data and the noise differ from those of a run that was never interrupted.",
        checkpoint,
    )
    return None


class ReferenceCheckpointCallback(TrainerCallback):
    """Adds the moving reference of `sync_ref_model` to every checkpoint.

    Args:
        trainer: A diffusion preference trainer whose `ref_model` is a denoiser.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        """Write the reference into the checkpoint that was just saved."""
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save and folder.is_dir():
            denoiser = self.trainer.accelerator.unwrap_model(self.trainer.ref_model)
            self.trainer.adapter.save_denoiser(denoiser, folder / REFERENCE_FOLDER)
