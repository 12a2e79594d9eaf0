# SPDX-License-Identifier: Apache-2.0
"""What the samples of a folder are a function of: the model and its sampler, the prompts, the settings, the libraries.

settings.json     all of it; a folder that has another one is refused
prompts.jsonl     the prompts, one record per line
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.cache.shards import write_whole
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.generation.prompt_sets import PromptRecord

SETTINGS_FILE = "settings.json"
PROMPTS_FILE = "prompts.jsonl"
FORMAT = 1

_PACKAGES = ("torch", "diffusers", "transformers", "peft")
_SAMPLED_VALUES = 256
_FOR_THE_RECORD = "name"  # says what the model is called, which the samples do not depend on
_SHOWN_DIFFERENCES = 6


def describe_model(adapter: BackboneAdapter) -> dict[str, Any]:
    """The pipeline's class, its sampler, and fingerprints of its weights: where they lie does not count."""
    pipeline = adapter.pipeline
    device = pipeline.device.type
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    return {
        "pipeline": type(pipeline).__name__,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **config},
        "weights": {name: weights_fingerprint(module) for name, module in _modules(pipeline)},
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
    }


def _modules(pipeline: Any) -> list[tuple[str, torch.nn.Module]]:
    return [(name, part) for name, part in sorted(pipeline.components.items()) if isinstance(part, torch.nn.Module)]


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Of a model in memory, whatever it was loaded from, and of the LoRA that acts in it.

    Of each tensor that is saved with a model, its name, shape and dtype count, and values from all over it: no
    training leaves all of these as they were.
    """
    digest, samples = hashlib.blake2b(digest_size=8), []
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            flat = value.detach().reshape(-1)
            samples.append(flat[:: max(flat.numel() // _SAMPLED_VALUES, 1)].float())
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            state = layer.active_adapters, layer.disable_adapters, layer.merged_adapters
            digest.update(f"{name} {state} {sorted(getattr(layer, 'scaling', {}).items())}\n".encode())
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def describe_prompts(prompts: Sequence[PromptRecord]) -> dict[str, Any]:
    """How many there are, and a fingerprint of their names and texts."""
    text = json.dumps([[record.prompt_id, record.prompt] for record in prompts])
    return {"number": len(prompts), "fingerprint": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


def identity(
    adapter: BackboneAdapter, prompts: Sequence[PromptRecord], settings: Mapping[str, Any], name: str | None
) -> dict[str, Any]:
    """All that the samples are a function of, as it is written to `settings.json`.

    The device and the size of a batch change samples by rounding alone, and do not count.
    """
    described = {
        "format": FORMAT,
        _FOR_THE_RECORD: name,
        "settings": dict(settings),
        "model": describe_model(adapter),
        "prompts": describe_prompts(prompts),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    return json.loads(json.dumps(described, default=str))  # as it is read again: tuples are lists


def check_folder(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise [`ConfigurationError`] if a folder holds other samples than those that are wanted, with what differs.

    Raises:
        DatasetError: Its `settings.json` cannot be read.
    """
    if not (folder / SETTINGS_FILE).is_file():
        others = [entry.name for entry in folder.iterdir() if entry.name[0] != "."] if folder.is_dir() else []
        if set(others) - {PROMPTS_FILE}:  # which is written first
            raise ConfigurationError(
                f"The folder {str(folder)!r} holds {others[0]!r}, and does not say that it holds samples "
                f"({SETTINGS_FILE} is missing). Give another one."
            )
        return
    differences = setting_differences(read_settings(folder), wanted)[:_SHOWN_DIFFERENCES]
    if differences:
        shown = "; ".join(f"{name}: {found!r} there, {now!r} now" for name, found, now in differences)
        raise ConfigurationError(
            f"The samples in {str(folder)!r} are others than those that are wanted. {shown}. Give another folder, or "
            "the same settings and model to go on with this one, or remove it to begin anew."
        )


def setting_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Names, written with points, of what two trees of settings do not share, and both values."""
    before, now = _flat(found), _flat(wanted)
    names = [name for name in {**before, **now} if name != _FOR_THE_RECORD and before.get(name) != now.get(name)]
    return [(name, before.get(name), now.get(name)) for name in names]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def write_folder(folder: Path, described: Mapping[str, Any], prompts: Sequence[PromptRecord]) -> None:
    """Write the two files that say what the samples are, unless they are there.

    Raises:
        StorageError: They cannot be written.
    """
    if (folder / SETTINGS_FILE).is_file():
        return
    lines = "".join(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n" for record in prompts)
    text = json.dumps(described, indent=2) + "\n"
    write_whole(folder / PROMPTS_FILE, lambda path: path.write_text(lines, encoding="utf-8"))
    write_whole(folder / SETTINGS_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def read_settings(folder: Path) -> dict[str, Any]:
    """`settings.json` of a folder of samples.

    Raises:
        DatasetError: It is not there, or not one of this version.
    """
    path = folder / SETTINGS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError(f"{str(folder)!r} is no folder of samples: {SETTINGS_FILE} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DatasetError(f"{str(path)!r} is not of format {FORMAT}, which this version of trl-sipo reads.")
    return content


def read_prompts(folder: Path) -> list[PromptRecord]:
    """The prompts of a folder of samples.

    Raises:
        DatasetError: They cannot be read.
    """
    path = folder / PROMPTS_FILE
    try:
        # Not `splitlines`: prompts may hold other separators than the ends of lines.
        lines = path.read_text(encoding="utf-8").split("\n")
        prompts = [PromptRecord(**json.loads(line)) for line in lines if line]
        if not prompts or not all(isinstance(record.prompt, str) for record in prompts):
            raise TypeError("it holds no prompts, or one that is no text")
        return prompts
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
