# SPDX-License-Identifier: Apache-2.0
"""Parts of a pipeline that are there with their configuration and without their weights, on the meta device.

Training from encoded pairs needs of a VAE what its configuration says, and encoding needs as much of a denoiser.
"""

import importlib
from typing import Any

import torch
from torch import nn

from trl_sipo.errors import BackboneError

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
    component_class = getattr(importlib.import_module(library), class_name)
    try:
        if library == "diffusers":
            config = component_class.load_config(name, subfolder=part, **hub_kwargs)
        else:
            config = component_class.config_class.from_pretrained(name, subfolder=part, **hub_kwargs)
        with torch.device("meta"):
            module = component_class.from_config(config) if library == "diffusers" else component_class(config)
    except (OSError, ValueError) as error:
        raise BackboneError(f"The configuration of {part} of {name!r} cannot be read: {error}") from error
    return module.requires_grad_(False).eval()
