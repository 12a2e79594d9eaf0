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


def _from_outside_in(module: Any) -> Iterator[Any]:
    while isinstance(module, nn.Module):
        yield module
        if isinstance(module, PeftModel):
            module = module.get_base_model()
        else:
            # `_orig_mod` is torch.compile's, `module` that of DistributedDataParallel, FSDP and DeepSpeed.
            module = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
