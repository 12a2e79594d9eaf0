# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, and how all processes write it: a LoRA or a whole pipeline, and what a run goes on with."""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.errors import CheckpointError, ConfigurationError
from trl_sipo.trainer import checkpoint_files
from trl_sipo.trainer.checkpoint_files import MANIFEST_FILE, STATE_FILE
from trl_sipo.trainer.level_memory import LEVEL_MEMORY_FILE
from trl_sipo.trainer.processes import OtherProcessError, together
from trl_sipo.trainer.run_state import RUN_STATE_FILE, STREAM_POSITION_FILE
from trl_sipo.trainer.sharding import is_filling, refilled

REFERENCE_FOLDER = "reference"
# Files by which a run continues; they are no part of the model.
_TRAINER_STATE = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin",
    REFERENCE_FOLDER, STREAM_POSITION_FILE, RUN_STATE_FILE, LEVEL_MEMORY_FILE, MANIFEST_FILE, "README.md",
    "global_step*", "latest", "zero_to_fp32.py",  # of DeepSpeed
    "pytorch_model_fsdp*",
)  # fmt: skip
# What full disks and missing rights show themselves by: torch raises a RuntimeError.
STORAGE_FAILURES = (OSError, RuntimeError, SafetensorError)


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
    with refilled(model) as plain:
        if plain is not model and not is_filling():
            return
        if isinstance(plain, PeftModel):
            adapter.load_lora(plain, directory)
        else:
            adapter.load_denoiser(plain, directory)


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
    """Copy the model's files out of a checkpoint, so that the folder above it can be pushed as a model.

    Raises:
        CheckpointError: They could not be written.
    """
    ignored = shutil.ignore_patterns(*_TRAINER_STATE)
    try:
        with checkpoint_files.written_whole(Path(output_dir)) as folder:
            shutil.copytree(checkpoint, folder, ignore=ignored, dirs_exist_ok=True)
    except OSError as error:
        raise could_not_save(Path(output_dir), Path(checkpoint).parent, error) from error


def write_checkpoint(trainer: Any, trial: Any = None) -> Path:
    """Write the checkpoint of the present step, whole or not at all; every process takes part.

    Args:
        trainer: A diffusion preference trainer.
        trial: Of a search over hyper-parameters, whose runs have folders of their own.

    Returns:
        Its folder.

    Raises:
        CheckpointError: It could not be written, for want of room or of rights. Earlier ones are as they were.
    """
    run_dir = Path(trainer._get_output_dir(trial=trial))
    checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    if trial is None:
        trainer.store_flos()
    note_best(trainer, run_dir)
    collected = trainer.run_state.collect()
    try:
        _write(trainer, checkpoint, collected)
    except BaseException as error:
        if trainer.args.should_save:
            checkpoint_files.discard(checkpoint)
        if isinstance(error, STORAGE_FAILURES):
            raise _could_not_write(checkpoint, error) from error
        raise
    keep_to_limit(trainer, checkpoint)
    return checkpoint


def keep_to_limit(trainer: Any, newest: Path) -> None:
    """Delete what `save_total_limit` leaves no room for; the newest checkpoint and the best stay in any case."""
    if trainer.args.should_save:
        best = trainer.state.best_model_checkpoint
        keep = {newest} if best is None else {newest, Path(best)}
        checkpoint_files.rotate(newest.parent, trainer.args.save_total_limit, keep)


def _write(trainer: Any, checkpoint: Path, collected: dict[str, Any]) -> None:
    """Step by step, so that no process goes on to wait for one that has failed."""
    args, folder = trainer.args, checkpoint_files.temporary_folder(checkpoint)

    def begin() -> None:
        # TRL writes it with every checkpoint, under this name.
        trainer.create_model_card(model_name=Path(args.hub_model_id or args.output_dir).name)
        if args.should_save:
            checkpoint_files.begin(checkpoint)

    def save_training_state() -> None:
        trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        trainer._save_rng_state(str(folder))

    def finish() -> None:
        if args.should_save:
            _save_run(trainer, collected, folder)
            checkpoint_files.publish(checkpoint)

    # These engines gather weights and optimiser while they save them.
    communicates = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    together(begin)
    together(lambda: trainer.save_model(str(folder), _internal_call=True), communicates=communicates)
    if not args.save_only_model:
        together(save_training_state, communicates=communicates)
    together(finish)


def _save_run(trainer: Any, collected: dict[str, Any], folder: Path) -> None:
    """What one process knows for all: the trainer's state and ours."""
    trainer.run_state.save(collected, folder)
    trainer.level_memory.save(folder)
    if trainer.args.sync_ref_model:
        trainer.adapter.save_denoiser(trainer.accelerator.unwrap_model(trainer.ref_model), folder / REFERENCE_FOLDER)
    states: dict[str, list[Any]] = {}
    for part in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(part, ExportableState):
            states.setdefault(type(part).__name__, []).append(part.state())
    trainer.state.stateful_callbacks |= {name: of[0] if len(of) == 1 else of for name, of in states.items()}
    trainer.state.save_to_json(str(folder / STATE_FILE))


def note_best(trainer: Any, run_dir: Path) -> None:
    """Let the state name the best checkpoint by the place where it is, or will be."""
    best = trainer.state.best_global_step
    if not best:
        return
    folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}"
    if best == trainer.state.global_step or folder.is_dir():
        trainer.state.best_model_checkpoint = str(folder)


def could_not_save(folder: Path, run_dir: Path, error: BaseException) -> CheckpointError:
    """The error of a model that could not be saved, outside of a checkpoint."""
    return CheckpointError(
        f"The model could not be saved to {folder} ({_reason(error)}). {_room(folder)} What was there before is as it "
        f"was; {_last_checkpoint(run_dir)}. Make room, and save the model again, here or in a run that is resumed."
    )


def _could_not_write(checkpoint: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {checkpoint} could not be written ({_reason(error)}). {_room(checkpoint)} Nothing of it is "
        f"left behind; {_last_checkpoint(checkpoint.parent)}. Make room, or lower `save_total_limit`, and resume with "
        "`resume_from_checkpoint=True`."
    )


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, OtherProcessError) else f"{type(error).__name__}: {error}"


def _room(folder: Path) -> str:
    disk = next(place for place in (folder, *folder.parents) if place.is_dir())
    return f"{shutil.disk_usage(disk).free / 1e6:,.0f} MB are free on its disk."


def _last_checkpoint(run_dir: Path) -> str:
    last = checkpoint_files.last_complete_checkpoint(run_dir)
    return "there is no earlier checkpoint" if last is None else f"the run can be resumed from {last}"
