# SPDX-License-Identifier: Apache-2.0
"""A backbone of each kind that makes a difference to LoRA files, and trained LoRAs in them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.adapters.backbone_cases import BACKBONES, PROMPTS, BackboneCase
from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter, Conditioning
from trl_sipo.adapters.lora import LORA_FILE_NAME

# A U-Net, whose files have names of their own; two streams of tokens; targets by a regular expression; a pipeline
# without LoRA methods; two experts with a file each.
KINDS = ("sd", "sd3", "flux2", "hunyuanvideo15", "wan22_a14b")
CASES = {kind: next(case for case in BACKBONES if case.name.split("-")[0] == kind) for kind in KINDS}
each_kind = pytest.mark.parametrize("case", CASES.values(), ids=KINDS)
# For what does not depend on the backbone: one file, and two.
one_and_two_files = pytest.mark.parametrize("case", [CASES["sd"], CASES["wan22_a14b"]], ids=["one", "two"])
FILE_NAMES = [LORA_FILE_NAME, "pytorch_lora_weights_2.safetensors"]

LORA_OPTIONS = {
    "alpha_equals_rank": {"r": 4, "lora_alpha": 4},
    "alpha_above_rank": {"r": 4, "lora_alpha": 16},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "regex": {"target_modules": r".*attn2?.*\.(to_q|to_out\.0)"},
    "all_linear": {"target_modules": "all-linear"},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5}},
    "lora_bias": {"lora_bias": True, "init_lora_weights": True},
}
# The last is for a file in which diffusers could rename some layers and not others; the rest are much like others.
ONLY_FOR_UNETS = ("alpha_equals_rank", "gaussian", "dropout", "last_name")
each_option = pytest.mark.parametrize(
    "case, name",
    [
        pytest.param(case, name, id=f"{name}-{kind}")
        for kind, case in CASES.items()
        for name in [*LORA_OPTIONS, "mixed_names", "last_name"]
        if kind == "sd" or name not in ONLY_FOR_UNETS
    ],
)


def options_of(case: BackboneCase, name: str) -> dict:
    """What `name` of `each_option` says of the LoRA's configuration."""
    if name == "mixed_names":
        return {"target_modules": [*case.linear_targets, base_model(case).input_layer_name]}
    return {"target_modules": [case.linear_targets[-1]]} if name == "last_name" else LORA_OPTIONS[name]


def build_lora(adapter: BackboneAdapter, seed: int = 0, **options) -> PeftModel:
    """A PEFT model in eval mode with random LoRA weights, as after some training."""
    targets = adapter.lora_target_modules
    targets = targets if isinstance(targets, str) else list(targets)
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": targets, **options}
    denoiser = get_peft_model(adapter.denoiser, LoraConfig(**arguments)).eval()
    randomize(denoiser, seed)
    return denoiser


def randomize(denoiser: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "magnitude" in name else 0.3 * noise)


@cache
def base_model(case: BackboneCase) -> BackboneAdapter:
    """The adapter of a pipeline that no test changes."""
    return adapter_for(case.build())


@cache
def conditioning(case: BackboneCase) -> Conditioning:
    return base_model(case).collate(base_model(case).encode_prompts(PROMPTS))


@cache
def base_prediction(case: BackboneCase) -> Tensor:
    return predict(base_model(case), base_model(case).denoiser, case)


def forward(adapter: BackboneAdapter, denoiser: nn.Module, case: BackboneCase) -> Tensor:
    """At a clean and at a noisy level: of two experts, each takes one."""
    latents = torch.randn(2, *adapter.latent_shape(**case.size), generator=torch.Generator().manual_seed(5))
    level = adapter.noise_schedule.level_at(torch.tensor([0.2, 0.8]))
    return adapter.forward(denoiser, latents, level, conditioning(case))


@torch.no_grad()
def predict(adapter: BackboneAdapter, denoiser: nn.Module, case: BackboneCase) -> Tensor:
    return forward(adapter, denoiser, case)


def lora_weights(denoiser: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in denoiser.named_parameters() if f".{name}." in f"{key}."}


def lora_layers(denoiser: nn.Module) -> list[str]:
    return [name for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)]


def saved_lora(case: BackboneCase, directory: Path, **options) -> Tensor:
    """Save a trained LoRA and give its prediction."""
    adapter = adapter_for(case.build())
    denoiser = build_lora(adapter, **options)
    adapter.save_lora(denoiser, directory)
    return predict(adapter, denoiser, case)


def loaded_lora(case: BackboneCase, directory: Path, **options) -> BackboneAdapter:
    """The adapter of a fresh pipeline into which plain diffusers loaded a LoRA."""
    pipeline = case.build()
    case.load_lora(pipeline, directory, **options)
    return adapter_for(pipeline)


def predict_loaded(case: BackboneCase, directory: Path) -> Tensor:
    """What plain diffusers makes of a saved LoRA."""
    adapter = loaded_lora(case, directory)
    return predict(adapter, adapter.denoiser, case)


def lora_files(directory: Path) -> list[Path]:
    """The file, or those of two experts; there is nothing else in the folder."""
    paths = sorted(directory.iterdir())
    assert paths and [path.name for path in paths] == FILE_NAMES[: len(paths)]
    return paths


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], keep_metadata: bool = True) -> None:
    """Change the weights in a LoRA file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() if keep_metadata else None
    save_file(change(load_file(path)), path, metadata=metadata)


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
