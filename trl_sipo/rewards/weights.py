# SPDX-License-Identifier: Apache-2.0
"""Weights of rewards: from a folder, a file or the hub, without running what others wrote, and what they are.

Safetensors is what is read. Where a reward was published as a pickle of PyTorch alone, that file is read by
`weights_only`, which makes tensors and plain containers and nothing else.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from trl_sipo.errors import ConfigurationError

# Repositories whose main branch has no safetensors; transformers reads their pickles by `weights_only`.
ONLY_PICKLES = frozenset({"openai/clip-vit-base-patch32"})

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

Model = TypeVar("Model")


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The floating point type of weights, by name or as it is.

    Raises:
        ConfigurationError: another one.
    """
    if dtype in _DTYPES.values():
        return dtype
    if dtype not in _DTYPES:
        raise ConfigurationError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    return _DTYPES[dtype]


def load_model(model_class: type[Model], name: str, *, revision: str | None, dtype: str | torch.dtype) -> Model:
    """A model of transformers, in eval mode on the CPU.

    Args:
        model_class: such as `CLIPModel`.
        name: a folder that `save_pretrained` wrote, or a model id of the hub.
        revision: of the hub, a branch or a commit.
        dtype: of the weights.

    Raises:
        ConfigurationError: it is not there, cannot be downloaded, or has no safetensors.
    """
    weights = "pytorch_model.bin" if name in ONLY_PICKLES else "*.safetensors"
    folder = _folder(name, revision, (weights, "*.json"))
    try:
        return model_class.from_pretrained(
            folder, use_safetensors=name not in ONLY_PICKLES, dtype=torch_dtype(dtype)
        ).eval()
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        raise ConfigurationError(
            f"The {model_class.__name__} in {folder} does not load: {_reason(error)} It needs config.json and "
            f"weights as safetensors; to fetch them: hf download {name}"
        ) from error


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """A tokenizer of transformers, from a folder or the hub.

    Raises:
        ConfigurationError: it is not there, or cannot be downloaded.
    """
    from transformers import AutoTokenizer

    folder = _folder(name, revision, ("*.json", "*.txt"))
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"The tokenizer in {folder} does not load: {_reason(error)} To fetch it: hf download {name} "
            "--include '*.json' '*.txt'"
        ) from error


def weights_file(name: str, file_name: str, *, revision: str | None) -> Path:
    """A file of weights: `name` itself, `file_name` in the folder `name`, or in the hub's repository of that id.

    Raises:
        ConfigurationError: it is not there, or cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / file_name).is_file():
        return path / file_name
    _refuse_paths(name, f"a file of weights, or a folder with {file_name}")
    try:
        return Path(hf_hub_download(name, file_name, revision=revision))
    except (OSError, ValueError) as error:
        raise ConfigurationError(_unreachable(f"{name} {file_name}", error)) from error


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU, of a safetensors file, or of a pickle of PyTorch, by `weights_only`.

    Of a checkpoint that keeps them under `state_dict`, those.

    Raises:
        ConfigurationError: the file is broken, or a pickle that holds more than tensors and plain containers.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that make no sense, the unpickler raises whatever it comes upon
        raise ConfigurationError(
            f"{file} is not read: {_reason(error)} It must be safetensors, or a file of PyTorch that holds tensors "
            "alone. Download it again; if it is yours, save `model.state_dict()` as safetensors."
        ) from error
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)
    if not isinstance(weights, dict) or not weights or not all(map(_is_weight, weights.items())):
        raise ConfigurationError(f"{file} holds no weights: expected tensors by name.")
    return weights


def _is_weight(item: tuple[Any, Any]) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def assign_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], *, source: str) -> None:
    """Give `module` exactly these weights; it may have been made without any (`accelerate.init_empty_weights`).

    Raises:
        ConfigurationError: some are missing, unknown or of another shape: not the model that `source` should be.
    """
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ConfigurationError(f"{source} does not fit {type(module).__name__}: {lines[:500]}") from error


def weights_hash(modules: Iterable[torch.nn.Module]) -> str:
    """SHA-256 of the configurations and of all tensors of models, wherever they came from."""
    digest = hashlib.sha256()
    for module in modules:
        config = getattr(module, "config", None)
        digest.update(json.dumps(_without_paths(config.to_dict()) if config else {}, sort_keys=True).encode())
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without where it came from."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else str(value)
        for key, value in config.items()
        if key != "_name_or_path"
    }


def _folder(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder of that name, or one with these files of the hub's repository.

    transformers, asked for the repository itself, would have one without safetensors converted by a service.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    _refuse_paths(name, "a folder that `save_pretrained` wrote")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ConfigurationError(_unreachable(name, error)) from error


def _refuse_paths(name: str, wanted: str) -> None:
    """Refuse what is plainly a path of nothing, rather than to ask the hub for it."""
    if name.startswith(("/", "./", "../", "~")) or name.endswith(_SUFFIXES) or name.count("/") != 1:
        raise ConfigurationError(f"There is no {name!r}: expected {wanted}, or a model id of the hub ('org/model').")


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"{name.split()[0]!r} is no local file or folder, and the Hugging Face Hub did not give it: "
        f"{_reason(error)} Where there is a network: hf download {name}; then copy the folder and name it here, "
        "or share the cache (HF_HOME)."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):  # its own text advises to read the file unsafely
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        return f"its pickle asks for {wanted[1]}." if wanted else "it is no file of tensors."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
