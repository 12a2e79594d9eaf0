# SPDX-License-Identifier: Apache-2.0
"""The models of a comparison: how they are named on a command line, and loading them, with or without a LoRA."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from trl_sipo.adapters import adapter_for, denoiser_names, load_pipeline
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.errors import BackboneError, ConfigurationError
from trl_sipo.generation.names import check_folder_names
from trl_sipo.generation.processes import process_state

DTYPES = ("float32", "bfloat16", "float16")
# Of the denoiser, and of the second one of a pipeline that has two.
LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors")


@dataclass(frozen=True)
class ModelSpec:
    """A model and what it is called in tables.

    Attributes:
        name: Safe as the name of a folder.
        model: Hub id or local folder of a pipeline; or the folder of a run or checkpoint that trained all weights, or
            a LoRA on a model of the hub.
        lora: Folder, file or hub id of a LoRA that is put on it.
    """

    name: str
    model: str
    lora: str | None = None

    def __post_init__(self) -> None:
        check_folder_names([self.name], "model")
        if not self.model or self.lora == "":
            raise ConfigurationError(f"The model {self.name!r} is empty: write NAME=MODEL or NAME=MODEL+LORA.")

    def __str__(self) -> str:
        return f"{self.name}={self.model}" + ("" if self.lora is None else f"+{self.lora}")


def parse_model(text: str) -> ModelSpec:
    """`NAME=MODEL` or `NAME=MODEL+LORA`.

    A plus sign within an existing folder's name separates nothing.

    Raises:
        ConfigurationError: It is neither, or the name cannot be that of a folder.
    """
    name, separator, model = text.partition("=")
    if not separator:
        raise ConfigurationError(
            f"{text!r} is no model: write NAME=MODEL or NAME=MODEL+LORA, such as tuned=org/base+runs/sipo."
        )
    return ModelSpec(name, *_split_lora(model))


def parse_models(texts: Sequence[str]) -> list[ModelSpec]:
    """Some models, each under its own name.

    Raises:
        ConfigurationError: As [`parse_model`], or there are none, or two of one name.
    """
    if not texts:
        raise ConfigurationError("No model is given: write NAME=MODEL or NAME=MODEL+LORA.")
    specs = [parse_model(text) for text in texts]
    check_folder_names([spec.name for spec in specs], "model")
    return specs


def _split_lora(model: str) -> tuple[str, str | None]:
    splits = [(model[:place], model[place + 1 :]) for place, sign in enumerate(model) if sign == "+"]
    if not splits or Path(model).expanduser().exists():
        return model, None
    there = (pair for pair in splits if all(Path(part).expanduser().exists() for part in pair))
    return next(there, splits[-1])


def check_models(specs: Sequence[ModelSpec]) -> None:
    """Look whether each model and its LoRA are where they are said to be, before one of them works for hours.

    Raises:
        BackboneError: One is not there, or no adapter knows its pipeline.
    """
    for spec in specs:
        base, lora = _base_and_lora(spec)
        denoiser_names(base)
        if lora is not None:
            _check_lora_location(Path(lora).expanduser(), lora)


def load_model(
    spec: ModelSpec,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    **init_kwargs: Any,
) -> BackboneAdapter:
    """Load a model to sample with it; weights come from safetensors files alone.

    Args:
        dtype: Of all but the VAE, which stays in float32: several overflow in float16.
        device: By default the GPU of this process, if there is one.
        init_kwargs: Passed to [`load_pipeline`], such as `revision` or `variant`.

    Raises:
        BackboneError: The pipeline or its LoRA is not there, or does not load.
        ConfigurationError: An unknown dtype.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigurationError(f"`dtype` must be one of {', '.join(DTYPES)}; got {dtype!r}.")
        dtype = getattr(torch, dtype)
    base, lora = _base_and_lora(spec)
    pipeline: Any = load_pipeline(base, dtype={"default": dtype, "vae": torch.float32}, **init_kwargs)
    if lora is not None:
        apply_lora(pipeline, lora)
    adapter = adapter_for(pipeline.to(process_state().device if device is None else device))
    adapter.freeze()
    adapter.denoiser.requires_grad_(False).eval()
    return adapter


def _base_and_lora(spec: ModelSpec) -> tuple[str, str | None]:
    """The pipeline, and the LoRA on it; of the folder of a LoRA's run, the base is what its model card names."""
    folder = Path(spec.model).expanduser()
    if spec.lora is not None or (folder / "model_index.json").is_file() or not (folder / LORA_FILES[0]).is_file():
        return spec.model, spec.lora
    card = folder / "README.md"
    base = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model") if card.is_file() else None
    if not isinstance(base, str):
        raise BackboneError(
            f"{spec.model!r} holds a LoRA, and does not say of which model: write {spec.name}=BASE+{spec.model}, with "
            "the pipeline that it was trained on for BASE."
        )
    return base, spec.model


def apply_lora(pipeline: DiffusionPipeline, lora: str | os.PathLike[str]) -> None:
    """Put what a training run saved on a pipeline, one file for each of its denoisers.

    Args:
        lora: A run's folder or checkpoint, a safetensors file, or a hub id.

    Raises:
        BackboneError: There is none, or it is none of this pipeline's.
    """
    path = Path(lora).expanduser()
    _check_lora_location(path, os.fspath(lora))
    source, options = _lora_source(path, os.fspath(lora))
    model: Any = pipeline
    try:
        if not hasattr(pipeline, "load_lora_weights"):  # diffusers gives this pipeline's denoiser alone the methods
            model.transformer.load_lora_adapter(source, **options)
        else:
            model.load_lora_weights(source, **options)
        if (path / LORA_FILES[1]).is_file():
            second = {**options, "weight_name": LORA_FILES[1]}
            model.load_lora_weights(source, load_into_transformer_2=True, **second)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise BackboneError(f"The LoRA {os.fspath(lora)!r} does not load into this pipeline: {error}") from error
    # diffusers passes over the LoRA of another kind of denoiser with a warning.
    if not any(getattr(module, "peft_config", None) for module in model.components.values()):
        raise BackboneError(
            f"The LoRA {os.fspath(lora)!r} is not one of a {type(pipeline).__name__}: nothing was loaded."
        )


def check_lora(lora: str | os.PathLike[str]) -> None:
    """Raise [`BackboneError`] where there is no LoRA of that name; one on the hub is not looked for."""
    _check_lora_location(Path(lora).expanduser(), os.fspath(lora))


def _check_lora_location(path: Path, lora: str) -> None:
    if path.is_dir() and not (path / LORA_FILES[0]).is_file():
        raise BackboneError(f"There is no LoRA in {lora!r}: {LORA_FILES[0]} is missing. Give a run's folder.")
    if path.is_file() and path.suffix != ".safetensors":
        raise BackboneError(f"{lora!r} is no safetensors file: weights are read from these alone.")
    if not path.exists() and (lora.startswith((".", "/", "~", "\\")) or len(Path(lora).parts) != 2):
        raise BackboneError(
            f"There is no LoRA {lora!r} (seen from {os.getcwd()}), and it is not a hub id of the form 'org/model'."
        )


def _lora_source(path: Path, lora: str) -> tuple[str, dict[str, Any]]:
    """Where diffusers finds the LoRA, and which file it is."""
    if path.is_file():
        return str(path.parent), {"weight_name": path.name, "use_safetensors": True}
    if path.is_dir():
        return str(path), {"weight_name": LORA_FILES[0], "use_safetensors": True}
    return lora, {"use_safetensors": True}
