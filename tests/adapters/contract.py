# SPDX-License-Identifier: Apache-2.0
"""What the two parts of the contract share: the cases as parameters, random media and latents, a LoRA that acts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.adapters.backbone_cases import BACKBONES, CASES, PROMPTS, BackboneCase
from trl_sipo.adapters.base import BackboneAdapter

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_backbone = pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case.name)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def media(case: BackboneCase, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, *case.media_shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents_for(adapter: BackboneAdapter, case: BackboneCase, batch: int = len(PROMPTS), seed: int = 0) -> Tensor:
    return randn(batch, *adapter.latent_shape(**case.size), seed=seed)


def trained_lora(adapter: BackboneAdapter, **options) -> nn.Module:
    """A PEFT model whose LoRA does something."""
    torch.manual_seed(1)
    arguments = {"r": 4, "target_modules": adapter.lora_target_modules, "init_lora_weights": False, **options}
    if isinstance(arguments["target_modules"], tuple):
        arguments["target_modules"] = list(arguments["target_modules"])
    return get_peft_model(adapter.denoiser, LoraConfig(**arguments))
