# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds besides the model, read as data and looked at before a run goes on with it.

A manifest finds out what a kill or a full disk did. It does not cover a checkpoint of an earlier version, files too
large for a checksum, or one that somebody else made; of those a file may be torn, hold something else, or be a pickle
that runs code. Each ends in an error that names the file, and the checkpoint to take instead.
"""

import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer import json_checks as checks
from trl_sipo.trainer.checkpoint_files import STATE_FILE, earlier_complete_checkpoint, step_of

# What keeps the state of an optimiser: a file, or a folder or files of their own under FSDP2 and DeepSpeed.
_OPTIMIZERS = ("optimizer*", "global_step*", "pytorch_model_fsdp*")
_SHOWN = 200  # characters of another library's error


def read_json(file: Path, check: checks.Check) -> Any:
    """The value that a file of a checkpoint holds.

    Args:
        check: Of the value.

    Raises:
        ConfigurationError: The file cannot be read, or holds something else; which field, and where to go on.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(file, f"it cannot be read as JSON ({_shown(error)})") from error
    if (reason := check(value, "")) is not None:
        raise unusable(file, reason)
    return value


def unusable(file: Path, reason: str) -> ConfigurationError:
    """The error of a file of a checkpoint that a run cannot go on with, because of `reason`, a clause."""
    earlier = earlier_complete_checkpoint(file.parent)
    way_out = "There is no earlier complete checkpoint beside it: restore the file from a copy, or start anew."
    if earlier is not None:
        way_out = f"Resume from the one before it: `resume_from_checkpoint={earlier}`."
    return ConfigurationError(
        f"The checkpoint {file.parent} cannot be continued from: {file.name} is damaged, or was not written by this "
        f"trainer: {reason}. {way_out}"
    )


def check_training_state(checkpoint: Path) -> None:
    """Look at what transformers is going to read of a checkpoint, without running or keeping any of it.

    Raises:
        ConfigurationError: A file is damaged, missing, or holds something else; which one, and where to go on.
    """
    _check_trainer_state(checkpoint)
    if not any(any(checkpoint.glob(name)) for name in _OPTIMIZERS):
        raise unusable(checkpoint / "optimizer.pt", "it is missing")
    if (checkpoint / "optimizer.pt").exists() and not (checkpoint / "scheduler.pt").exists():
        raise unusable(checkpoint / "scheduler.pt", "it is missing")  # else transformers takes up neither
    for pattern, check in _TENSOR_FILES.items():
        for file in sorted(checkpoint.glob(pattern)):
            _check_tensor_file(file, check)


@contextmanager
def taking_up(checkpoint: str | None, names: str) -> Iterator[None]:
    """Let a state that was read, and does not fit what the run has, end in an error that names its files."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if checkpoint is None or isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{names} of the checkpoint {checkpoint} do not fit this run ({_shown(error)}). Resume with the settings "
            "of the run that wrote it (optimiser, scheduler, precision, trained parameters), or start anew."
        ) from error


# ------------------------------------------------------------------------------------------------ trainer_state.json


_STEPS = checks.optional(checks.number(0, checks.LARGEST_COUNT))  # a ratio of all steps, too
_EXPORTED = checks.record({"args": checks.table(checks.anything()), "attributes": checks.table(checks.anything())})
_STATE_FIELDS: dict[str, checks.Check] = {
    "epoch": checks.number(0, checks.LARGEST_COUNT),
    "global_step": checks.count(),
    "max_steps": checks.count(),
    "logging_steps": _STEPS,
    "eval_steps": _STEPS,
    "save_steps": _STEPS,
    "train_batch_size": checks.optional(checks.count()),
    "num_train_epochs": checks.count(),
    "num_input_tokens_seen": checks.number(0, checks.LARGEST_COUNT),
    "total_flos": checks.number(0),
    "log_history": checks.items(checks.table(checks.anything())),
    "best_metric": checks.optional(checks.number(is_finite=False)),
    "best_global_step": checks.optional(checks.count()),
    "best_model_checkpoint": checks.optional(checks.text()),
    "stateful_callbacks": checks.table(checks.one_of(_EXPORTED, checks.items(_EXPORTED))),
}
_NEEDED = ("epoch", "global_step", "log_history")


def _check_trainer_state(checkpoint: Path) -> None:
    known = {field.name: _STATE_FIELDS.get(field.name, checks.anything()) for field in fields(TrainerState)}
    state = read_json(checkpoint / STATE_FILE, checks.record({name: known[name] for name in _NEEDED}, known))
    step = step_of(checkpoint)
    if step is not None and step != state["global_step"]:
        reason = f"its `global_step` is {state['global_step']}, and the folder is that of step {step}"
        raise unusable(checkpoint / STATE_FILE, reason)


# ------------------------------------------------------------------------------------------------ files of torch.save


def _check_tensor_file(file: Path, check: Callable[[Any], bool]) -> None:
    is_random_state = file.name.startswith("rng_state")
    allowed: AbstractContextManager = safe_globals() if is_random_state else nullcontext()  # NumPy's state is an array
    try:
        with allowed:
            # Mapped, not read: only the structure is looked at.
            value = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever PyTorch makes of such a file; its advice would be to switch the check off
        raise unusable(file, _why_not_read(error)) from None
    try:
        is_right = check(value)
    except Exception:  # as `random` or NumPy raises for a state that is none
        is_right = False
    if not is_right:
        raise unusable(file, f"it holds a {type(value).__name__} that is no such state")


def _why_not_read(error: Exception) -> str:
    asks_for = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
    if asks_for is not None:
        return f"it asks for `{asks_for[1]}`, which is neither a tensor nor a plain value; nothing of it was run"
    if "weights" in str(error).lower():
        return "it holds no tensors and plain values alone; nothing of it was run"
    return f"it cannot be read ({_shown(error)})"


def _is_optimizer_state(value: Any) -> bool:
    groups = value["param_groups"]
    return isinstance(value["state"], dict) and len(groups) > 0 and all(isinstance(group, dict) for group in groups)


def _is_scheduler_state(value: Any) -> bool:
    return isinstance(value, dict) and checks.count()(value.get("last_epoch", 0), "") is None


def _is_scaler_state(value: Any) -> bool:
    names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    return all(checks.number(0)(value[name], name) is None for name in names) and value["scale"] > 0


def _is_random_state(value: Any) -> bool:
    random.Random().setstate(value["python"])
    np.random.RandomState().set_state(value["numpy"])
    torch.Generator().set_state(value["cpu"])
    return True


_TENSOR_FILES = {
    "optimizer.pt": _is_optimizer_state,
    "scheduler.pt": _is_scheduler_state,
    "scaler.pt": _is_scaler_state,
    "rng_state*.pth": _is_random_state,
}


def _shown(error: BaseException) -> str:
    said = " ".join(str(error).split()).split(". ")[0]  # what follows is advice of the library
    return f"{type(error).__name__}: {said[:_SHOWN]}".removesuffix(": ")
