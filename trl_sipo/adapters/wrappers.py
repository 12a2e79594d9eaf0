# SPDX-License-Identifier: Apache-2.0
"""Finding the model under the wrappers of PEFT, `torch.compile` and distributed training."""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import nn


def unwrap_denoiser(denoiser: nn.Module) -> Any:
    """The diffusers model itself (a `ModelMixin`), under whatever wrappers."""
    *_, innermost = _from_outside_in(denoiser)
    return innermost


def find_peft_model(denoiser: nn.Module) -> PeftModel | None:
    """The PEFT model around the diffusers model, None if there is none."""
    return next((module for module in _from_outside_in(denoiser) if isinstance(module, PeftModel)), None)


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the classes of a denoiser's repeated blocks, as diffusers gives them, of those that it has."""
    named = set()
    for module in model.modules():
        for names in ("_repeated_blocks", "_no_split_modules"):
            named.update(getattr(module, names, None) or ())
    return sorted(named & {type(module).__name__ for module in model.modules()})


def _from_outside_in(module: Any) -> Iterator[Any]:
    while isinstance(module, nn.Module):
        yield module
        if isinstance(module, PeftModel):
            module = module.get_base_model()
        else:
            # `_orig_mod` is torch.compile's, `module` that of DistributedDataParallel, FSDP and DeepSpeed.
            module = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
