# SPDX-License-Identifier: Apache-2.0
"""`torch_compile=True`: the denoisers of policy and reference compiled in place, block by block where blocks repeat.

In place (`nn.Module.compile`) the modules stay what they are: there is no wrapper that policy, reference, sample grids
and saving would have to look through, and weights keep their names. Blocks whose LoRA is switched off, an evaluation
and arms of another shape are further graphs of the same blocks, made when they first come.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin

from trl_sipo.adapters.wrappers import unwrap_denoiser
from trl_sipo.errors import ConfigurationError

# Of one block: policy and reference, with gradient and without, of a fixed shape and of any.
GRAPHS_PER_BLOCK = 8


def check_compile_backend(backend: str | None) -> None:
    """Raise [`ConfigurationError`] unless torch has this backend and accelerate passes it on; `None` is the default.

    Args:
        backend: As `torch_compile_backend`, in either case.
    """
    if backend is None:
        return
    known = {name.lower() for name in DynamoBackend.list()} & set(torch._dynamo.list_backends(exclude_tags=()))
    if backend.lower() not in known:
        raise ConfigurationError(
            f"Unknown `torch_compile_backend` {backend!r}; installed are {sorted(known)}. Leave it out for 'inductor'."
        )


def compile_denoisers(accelerator: Accelerator, denoisers: Iterable[torch.nn.Module | None]) -> None:
    """Compile denoisers in place if `torch_compile`, or `accelerate launch --dynamo_backend`, asks for it.

    Args:
        accelerator: Its own compilation is switched off: it would wrap the policy, and leave the reference out.
        denoisers: Under any wrapper. `None` is left out; one that comes twice is compiled once.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
    for denoiser in {unwrap_denoiser(denoiser) for denoiser in denoisers if denoiser is not None}:
        regions = regions_of(denoiser)
        # Blocks of one class share a list of graphs, beyond whose end torch goes on without compiling; the blocks of a
        # U-Net have many widths.
        limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_BLOCK * len(regions))
        torch._dynamo.config.recompile_limit = limit
        for region in regions:
            region.compile(**plugin.to_kwargs())


def regions_of(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that diffusers says to repeat in a model; the model itself where it names none."""
    names = {name for module in denoiser.modules() for name in getattr(module, "_repeated_blocks", None) or ()}
    return [module for module in denoiser.modules() if type(module).__name__ in names] or [denoiser]


def uncompiled() -> AbstractContextManager[None]:
    """While it is in force, what was compiled runs as it was written, and nothing is compiled."""
    return torch.compiler.set_stance("force_eager")
