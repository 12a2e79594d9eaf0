# SPDX-License-Identifier: Apache-2.0
"""`attention_backend`: which kernel computes the attention of policy and reference, by diffusers' names."""

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

from trl_sipo.errors import ConfigurationError

# What libraries raise for a package, a device, a kernel or a derivative that is not there.
_REFUSALS = (ImportError, RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError)


def check_attention_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise [`ConfigurationError`] unless this kernel is known, installed, and differentiable on this device.

    Args:
        name: As `attention_backend`; `None` leaves the choice to diffusers.
        dtype: In which the network runs.
    """
    if name is None:
        return
    known = sorted(backend.value for backend in AttentionBackendName)
    if name not in known:
        raise ConfigurationError(
            f"Unknown `attention_backend` {name!r}; diffusers knows {known}. Leave it out, for PyTorch's own choice."
        )
    # Tried, on a small input: several kernels run on some devices only, and several have no backward pass.
    query = torch.zeros(1, 16, 2, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        with attention_backend(name):
            output = dispatch_attention_fn(query, query, query)
        output.sum().backward()
    except _REFUSALS as error:
        raise ConfigurationError(
            f"`attention_backend={name!r}` cannot train here, in {dtype} on {device.type}: {error} Leave it out, for "
            "PyTorch's own choice."
        ) from error


def use_attention_backend(denoiser: torch.nn.Module, name: str | None) -> None:
    """Let a denoiser compute its attention by this kernel; it is a setting of its layers, which no file keeps.

    Raises:
        ConfigurationError: Its layers call PyTorch's attention themselves.
    """
    if name is None:
        return
    models: list[Any] = [module for module in denoiser.modules() if isinstance(module, ModelMixin)]
    layers = [module for model in models for module in model.modules()]
    if not any(hasattr(getattr(layer, "processor", None), "_attention_backend") for layer in layers):
        raise ConfigurationError(
            f"`attention_backend={name!r}` has no effect on a {type(models[0]).__name__}, whose layers call PyTorch's "
            "own attention. Leave it out: PyTorch takes the fastest kernel that it has for this device."
        )
    # Within a block that puts it back: diffusers would also make it the kernel of every other model.
    with attention_backend():
        for model in models:
            model.set_attention_backend(name)
