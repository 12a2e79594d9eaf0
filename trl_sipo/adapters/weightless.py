# SPDX-License-Identifier: Apache-2.0
"""Parts of a pipeline that are there with their configuration and without their weights, on the meta device.

Training from encoded pairs needs of a VAE what its configuration says, and encoding needs as much of a denoiser.
"""

import importlib
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl_sipo.errors import BackboneError

_LIBRARIES = ("diffusers", "transformers")  # that a `model_index.json` may name
_LAYERS = re.compile(r"layers|depth|blocks")  # settings whose numbers are of modules that are made one by one
_MOST_LAYERS = 1000
_VARIANT = re.compile(r"(model)\.\w+(\.safetensors|\.bin)$")

logger = logging.getLogger(__name__)

ENCODER_NAMES = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The components that encode media and prompts, in every pipeline."""


def is_weightless(module: nn.Module) -> bool:
    """Whether a module has parameters, and they hold nothing."""
    parameter = next(module.parameters(), None)
    return parameter is not None and parameter.device.type == "meta"


def weightless_component(name: str, part: str, origin: list[str], hub_kwargs: dict[str, Any]) -> nn.Module:
    """A component of a saved pipeline, of which only the configuration is read, or downloaded.

    Args:
        name: folder or hub id of the pipeline.
        part: name of the component.
        origin: library and class, as in `model_index.json`.
        hub_kwargs: `revision`, `token` and the like.

    Raises:
        BackboneError: the configuration cannot be read.
    """
    library, class_name = origin
    if library not in _LIBRARIES:  # it comes with the model, and importing runs code
        raise BackboneError(
            f"The {part} of {name!r} is of the library {library!r}; known are {', '.join(_LIBRARIES)}."
        )
    component_class: Any = getattr(importlib.import_module(library), class_name, None)
    if not _is_model(component_class):
        raise BackboneError(f"The {part} of {name!r} is a {class_name!r:.80}, which is no model of {library}.")
    try:
        if library == "diffusers":
            config = component_class.load_config(name, subfolder=part, **hub_kwargs)
            _check_layers(config, part)
        else:
            _check_layers(component_class.config_class.get_config_dict(name, subfolder=part, **hub_kwargs)[0], part)
            config = component_class.config_class.from_pretrained(name, subfolder=part, **hub_kwargs)
        with torch.device("meta"):
            module = component_class.from_config(config) if library == "diffusers" else component_class(config)
    except BackboneError:
        raise
    except Exception as error:  # numbers where texts should be, and the like: the libraries raise errors of any kind
        raise BackboneError(f"The configuration of {part} of {name!r} cannot be read: {error}") from error
    return module.requires_grad_(False).eval()


def _check_layers(config: Any, part: str, name: str = "") -> None:
    """Raise [`BackboneError`] for a number of layers that would be made until the memory is full."""
    if isinstance(config, dict):
        for key, value in config.items():
            _check_layers(value, part, str(key))
    elif isinstance(config, list):
        for value in config:
            _check_layers(value, part, name)
    elif isinstance(config, int) and config > _MOST_LAYERS and _LAYERS.search(name):
        raise BackboneError(f"The configuration of {part} says {name!r:.80} = {config}: no model has so many layers.")


def _is_model(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _copy_as_plain(source: str, target: str) -> None:
    """Copy a file; weights that are there as a variant only ("model.fp16.safetensors") under their plain name."""
    is_variant_only = not Path(_VARIANT.sub(r"\1\2", source)).exists()
    shutil.copy2(source, _VARIANT.sub(r"\1\2", target) if is_variant_only else target)


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Save a pipeline for `from_pretrained`; what it holds without weights is copied from the folder it came from.

    Of a pipeline from the hub there is no such folder: the parts that have weights are saved alone, and a warning says
    how to load them.
    """
    components = pipeline.components
    absent = [name for name, part in components.items() if isinstance(part, nn.Module) and is_weightless(part)]
    if not absent:
        pipeline.save_pretrained(directory)
        return
    for name, part in components.items():
        if name not in absent and hasattr(part, "save_pretrained"):
            part.save_pretrained(directory / name)
    source = pipeline.config.get("_name_or_path") or ""
    if Path(source).is_dir():
        for name in absent:
            shutil.copytree(Path(source, name), directory / name, copy_function=_copy_as_plain, dirs_exist_ok=True)
        pipeline.save_config(directory)
        return
    denoisers = [name for name in ("unet", "transformer", "transformer_2") if components.get(name) is not None]
    arguments = ", ".join(
        f"{name}={type(components[name]).__name__}.from_pretrained(FOLDER, subfolder={name!r})" for name in denoisers
    )
    logger.warning(
        "The saved model holds no %s, which were not loaded from %s. Load it with %s.from_pretrained(%r, %s).",
        ", ".join(absent), source, type(pipeline).__name__, source, arguments,
    )  # fmt: skip
