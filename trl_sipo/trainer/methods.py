# SPDX-License-Identifier: Apache-2.0
"""The methods by the names that commands use."""

from importlib import import_module
from typing import Any

from trl_sipo.errors import ConfigurationError

# Name -> (configuration class, trainer class), both exported by `trl_sipo`.
METHODS = {
    "dpo": ("DiffusionDPOConfig", "DiffusionDPOTrainer"),
    "sipo": ("DiffusionSIPOConfig", "DiffusionSIPOTrainer"),
    "poly-dpo": ("DiffusionPolyDPOConfig", "DiffusionPolyDPOTrainer"),
    "kto": ("DiffusionKTOConfig", "DiffusionKTOTrainer"),
    "mapo": ("DiffusionMaPOConfig", "DiffusionMaPOTrainer"),
    "d3po": ("DiffusionD3POConfig", "DiffusionD3POTrainer"),
    "sft": ("DiffusionSFTConfig", "DiffusionSFTTrainer"),
}


def method_classes(name: str) -> tuple[Any, Any]:
    """The configuration and trainer classes of a method; imports the trainers.

    Raises:
        ConfigurationError: Unknown name.
    """
    if name not in METHODS:
        raise ConfigurationError(f"Unknown method {name!r}; known are {', '.join(METHODS)}.")
    config_class, trainer_class = METHODS[name]
    package = import_module("trl_sipo")
    return getattr(package, config_class), getattr(package, trainer_class)
