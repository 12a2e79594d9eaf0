# SPDX-License-Identifier: Apache-2.0
"""What is written down when a run starts: what it is going to do, with what, where, and by which command."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel

from trl_sipo.printing import names_secret, without_secrets, words_without_secrets
from trl_sipo.trainer.description import num_trained_parameters
from trl_sipo.trainer.environment import environment, processor_name
from trl_sipo.trainer.importance_config import ImportanceConfig

# What runs the cells of a notebook, by whatever name before it: a command that nobody has typed.
_NOTEBOOK = "kernel_launcher"
# In place of a program: what is typed at a prompt, piped in, or given as text, which is not known.
_NO_PROGRAM = ("", "-", "-c")


def describe_start(trainer: Any) -> dict[str, Any]:
    """What a line of `starts.jsonl` says, but for its format and time.

    Args:
        trainer: A diffusion preference trainer that is about to train, or to go on.
    """
    args, schedule = trainer.args, trainer.noise_schedule
    importance = args if isinstance(args, ImportanceConfig) else None
    return {
        "step": trainer.state.global_step,
        "method": trainer.method_name,
        "backbone": type(trainer.adapter.pipeline).__name__,
        "prediction_type": trainer.adapter.prediction_type,
        "beta_description": trainer.beta_description,
        "description": trainer.describe_run(),
        "command": command_words(),
        "settings": _without_secrets(args.to_dict()),
        "environment": {
            **environment(),
            "device": str(trainer.accelerator.device),
            "processor": processor_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "processes": trainer.accelerator.num_processes,
        },
        "trained_parameters": num_trained_parameters(trainer.model),
        "train_pairs": _count(trainer.train_dataset),
        "eval_pairs": _counts(trainer.eval_dataset),
        "model": _model_name(trainer),
        "lora": _lora(trainer.unwrapped_model),
        "mask_threshold": importance.lowest_weight if importance is not None and importance.mask else None,
        "clip_range": importance.clip_range if importance is not None and importance.reweight else None,
        "importance_steps": args.importance_steps,
        "num_train_timesteps": getattr(schedule, "num_train_timesteps", None) or round(schedule.timestep_scale),
    }


def command_words() -> list[str]:
    """The words of the command that runs, without secrets; none in a notebook and at a prompt.

    Of the program only what was typed: a command that is found on the PATH, or a module, shows itself by the path of
    its file, which names the user.
    """
    program, *options = getattr(sys, "argv", None) or [""]  # which a program that embeds Python may not set
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = Path(program).name
    if program in _NO_PROGRAM or _NOTEBOOK in name or (module is not None and _NOTEBOOK in module.name):
        return []
    if module is not None and name == "__main__.py":
        words = ["python", "-m", module.name.removesuffix(".__main__")]
    elif module is not None and name.endswith(".py"):
        words = ["python", "-m", module.name]
    elif name.endswith(".py"):
        words = ["python", name if os.path.isabs(program) else program]
    else:
        words = [name if os.path.isabs(program) else program]
    return words_without_secrets([*words, *options])


def _without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which tokens are left out, however deep; the configuration refuses most of them before."""
    return {name: _clean(value) for name, value in settings.items() if not names_secret(str(name))}


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return _without_secrets(value)
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value


def _model_name(trainer: Any) -> str | None:
    """The hub id or path of the model, as far as its pipeline knows one."""
    name = trainer.adapter.pipeline.config.get("_name_or_path")
    return without_secrets(str(name)) if name else None


def _lora(model: torch.nn.Module) -> dict[str, Any] | None:
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapters[0]]
    targets = config.target_modules
    listed = targets if isinstance(targets, str) or targets is None else sorted(targets)
    return {"r": config.r, "alpha": config.lora_alpha, "targets": listed} if hasattr(config, "lora_alpha") else None


def _counts(dataset: Any) -> Any:
    """Rows of a dataset, or by name those of several."""
    if isinstance(dataset, dict):
        return {name: _count(split) for name, split in dataset.items()}
    return None if dataset is None else _count(dataset)


def _count(dataset: Any) -> int | None:
    """Rows of a dataset; `None`: of a stream, which does not say."""
    is_stream = isinstance(dataset, IterableDataset | torch.utils.data.IterableDataset)
    return None if is_stream else len(dataset)
