# SPDX-License-Identifier: Apache-2.0
"""One row per backbone: everything in `test_contract.py` and `test_lora.py` runs on each."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.tiny_models import tiny_stable_diffusion

PROMPTS = ["a red cat", "two dogs on a boat"]


@dataclass(frozen=True)
class BackboneCase:
    """A tiny pipeline and how its inference is observed."""

    name: str
    build: Callable[[], DiffusionPipeline]
    latents_argument: str
    """Argument of the denoiser's forward that holds the noisy latents."""
    call_options: dict[str, Any] = field(default_factory=dict)
    """Options of `pipeline.__call__`; guidance off, so that the denoiser sees each prompt once."""
    media_shape: tuple[int, ...] = (3, 32, 32)
    linear_targets: tuple[str, ...] = ("to_q", "ff.net.2")
    """LoRA targets of which diffusers renames some and not others."""

    def generate(self, pipeline: DiffusionPipeline, steps: int = 2, **options: Any) -> Any:
        """What the pipeline gives for `PROMPTS` with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        arguments = {"generator": generator, "num_inference_steps": steps, **self.call_options, **options}
        return pipeline(PROMPTS, **arguments).images


def _stable_diffusion(prediction_type: str, scheduler: str, **options: Any) -> BackboneCase:
    return BackboneCase(
        name="-".join(["sd", prediction_type, scheduler, *options]),
        build=lambda: tiny_stable_diffusion(prediction_type, scheduler, **options),
        latents_argument="sample",
        call_options={"guidance_scale": 1.0},
    )


# The first row of a backbone is the one for tests that do not depend on the scheduler.
CASES = (
    _stable_diffusion("epsilon", "DDIM"),
    _stable_diffusion("v_prediction", "DDIM"),
    _stable_diffusion("epsilon", "PNDM"),
    _stable_diffusion("v_prediction", "EulerDiscrete"),
    _stable_diffusion("epsilon", "EulerDiscrete"),
    _stable_diffusion("v_prediction", "DDIM", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
)
BACKBONES = CASES[:1]


@contextmanager
def spied_forward(module: torch.nn.Module, replacement: Callable[..., Tensor] | None = None) -> Iterator[list[dict]]:
    """Record the arguments of every `module.forward`, by name and without those that are None.

    Args:
        module: a denoiser.
        replacement: called with the recorded arguments in place of the module; its tensor is the prediction.
    """
    original, calls = module.forward, []
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append({name: _copy(value) for name, value in arguments.items() if value is not None})
        return original(*args, **kwargs) if replacement is None else (replacement(calls[-1]),)

    module.forward = forward
    try:
        yield calls
    finally:
        del module.forward


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
