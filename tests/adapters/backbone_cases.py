# SPDX-License-Identifier: Apache-2.0
"""One row per backbone: everything in `test_contract*.py` runs on each.

The rows live beside one another in `cases/`, one file per family; `FAMILIES` lists them.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel

PROMPTS = ["a red cat", "two dogs on a boat"]


def integer_level_of_call(adapter: BackboneAdapter, call: dict) -> NoiseLevel:
    """The level at which inference called a denoiser of integer timesteps, one per prompt."""
    return adapter.noise_schedule.level(call["timestep"].flatten()[:1].expand(len(PROMPTS)).long())


def flow_level_of_call(adapter: BackboneAdapter, call: dict) -> NoiseLevel:
    """The level at which inference called a denoiser of scaled sigmas, one per prompt."""
    sigma = call["timestep"].flatten()[:1].float() / adapter.noise_schedule.timestep_scale
    return adapter.noise_schedule.level(sigma.expand(len(PROMPTS)))


def sampler_level_of_call(adapter: BackboneAdapter, call: dict) -> NoiseLevel:
    """The level of the flow sampler's present step, where what it gives the denoiser was rounded (UniPC)."""
    scheduler = adapter.pipeline.scheduler
    sigma = scheduler.sigmas[scheduler.step_index or 0].float()
    return adapter.noise_schedule.level(sigma.expand(len(PROMPTS)))


def first_latents(adapter: BackboneAdapter, clean: Tensor, noise: Tensor, steps: int) -> Tensor:
    """x_t at the first timestep of inference, in the adapter's layout: the path starts there, not at pure noise."""
    scheduler, schedule = adapter.pipeline.scheduler, adapter.noise_schedule
    if isinstance(schedule, FlowSchedule):
        return noise
    scheduler.set_timesteps(steps)
    first = schedule.level(torch.full((len(clean),), int(scheduler.timesteps[0])))
    start = first.add_noise(clean, noise)
    if "Euler" in type(scheduler).__name__:  # its latents are x_t / alpha_t
        start = start / first.alpha_t[0] / scheduler.init_noise_sigma
    return start


def _load_lora(pipeline: Any, directory: Any, **options: Any) -> None:
    pipeline.load_lora_weights(directory, **options)


def _identity(_adapter: BackboneAdapter, tensor: Any) -> Any:
    return tensor


@dataclass(frozen=True, eq=False)
class BackboneCase:
    """A tiny pipeline and how its inference is observed."""

    name: str
    build: Callable[[], DiffusionPipeline]
    latents_argument: str
    """Argument of the denoiser's forward that holds the noisy latents."""
    call_options: dict[str, Any] = field(default_factory=dict)
    """Options of `pipeline.__call__`: the size, and guidance off, so that the denoiser sees each prompt once."""
    media_shape: tuple[int, ...] = (3, 32, 32)
    """(3, H, W) or (3, F, H, W); what the pipeline draws with `call_options`."""
    linear_targets: tuple[str, ...] = ("to_q", "ff.net.2")
    """Two LoRA targets that are linear layers; of UNets, diffusers renames one and not the other."""
    level_of_call: Callable[[BackboneAdapter, dict], NoiseLevel] = integer_level_of_call
    """The noise level at which inference called the denoiser with these arguments."""
    canonical: Callable[[BackboneAdapter, Any], Tensor] = _identity
    """What the denoiser is given for latents, in the adapter's layout."""
    native: Callable[[BackboneAdapter, Tensor], Tensor] = _identity
    """The adapter's latents, in the layout of `pipeline(latents=...)` and of its step callback."""
    denoiser_output: Callable[[BackboneAdapter, Tensor], Any] | None = None
    """A prediction in the adapter's layout as the denoiser returns it; None: as `native`."""
    masks: dict[str, str] = field(default_factory=dict)
    """Arguments of the denoiser, with the argument that masks their tokens: it does not see the other ones."""
    unconditional: Callable[[DiffusionPipeline], dict] | None = None
    """The denoiser's arguments for inference's unconditional half; None: those of empty prompts."""
    reconstruct: Callable[[DiffusionPipeline, Tensor], Tensor] | None = None
    """Pixels in [-1, 1] through the VAE and back, without the adapter; None: encode, mean, decode."""
    decoded_by_pipeline: Callable[[BackboneAdapter, Tensor], Tensor] | None = None
    """Pixels in [0, 1] that the pipeline itself makes of latents; None: by a step callback."""
    load_lora: Callable[..., None] = _load_lora
    """(pipeline, folder, **options): how a user of plain diffusers loads the LoRA; an option is its adapter_name."""
    denoisers: Callable[[BackboneAdapter], Sequence[nn.Module]] = lambda adapter: [adapter.denoiser]
    """The modules that inference calls."""
    added_frames: int = 0
    """By how many frames the pipeline lengthens a video of the default length, before it draws latents for it."""
    not_as_in_bfloat16: tuple[str, ...] = ()
    """Arguments that the denoiser of a bfloat16 pipeline is given more precisely in training, as the adapter says."""
    floors_timesteps: bool = False
    """Whether inference rounds the timestep that it gives the denoiser down to integers (UniPC)."""
    grid_atol: float = 1e-5
    """By how much the sampler's grid of sigmas may differ from the schedule's (flow only)."""

    @property
    def size(self) -> dict[str, int]:
        """Height, width and number of frames of the media, as the adapter's methods take them."""
        *frames, height, width = self.media_shape[1:]
        return {"height": height, "width": width, "num_frames": frames[0] if frames else 1}

    def visible(self, call: dict) -> dict:
        """The denoiser's arguments with zeros in place of the tokens that it masks."""
        seen = {name: call[name].masked_fill(~call[mask].bool()[..., None], 0) for name, mask in self.masks.items()}
        return {**call, **seen}

    def generate(self, pipeline: DiffusionPipeline, steps: int = 2, **options: Any) -> Any:
        """What the pipeline gives for `PROMPTS` with a fixed seed; pixels (B, 3, [F,] H, W) with output_type="pt"."""
        generator = torch.Generator().manual_seed(0)
        prompts = list(PROMPTS)  # a copy: Z-Image writes into it
        defaults = {"prompt": prompts, "generator": generator, "num_inference_steps": steps}
        arguments = {**defaults, **self.call_options, **options}
        output = pipeline(**arguments)
        if hasattr(output, "images"):
            return output.images
        return output.frames.transpose(1, 2) if arguments.get("output_type") == "pt" else output.frames


@contextmanager
def spied_forward(
    modules: nn.Module | Sequence[nn.Module], replacement: Callable[..., Any] | None = None
) -> Iterator[list[dict]]:
    """Record the arguments of every `module.forward`, by name and without those that are None.

    Args:
        modules: a denoiser, or several.
        replacement: called with the recorded arguments in place of the module; what it returns is the prediction.
    """
    calls: list[dict] = []
    with ExitStack() as stack:
        for module in [modules] if isinstance(modules, nn.Module) else modules:
            stack.enter_context(_spied(module, replacement, calls))
        yield calls


@contextmanager
def _spied(module: nn.Module, replacement: Callable[..., Any] | None, calls: list[dict]) -> Iterator[None]:
    original = module.forward
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append({name: _copy(value) for name, value in arguments.items() if value is not None})
        return original(*args, **kwargs) if replacement is None else (replacement(calls[-1]),)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


# Modules of `tests.adapters.cases`, each with `CASES`. Of the rows whose names begin alike ("wan21" of "wan21-unipc")
# the first is the one for tests that do not depend on the scheduler.
FAMILIES = (
    "stable_diffusion",
    "stable_diffusion_3",
    "stable_diffusion_xl",
    "cogvideox",
    "flux",
    "flux2",
    "hunyuan_video",
    "hunyuan_video15",
    "ltx",
    "wan",
    "qwen_image",
    "z_image",
)

CASES: tuple[BackboneCase, ...] = tuple(
    case for family in FAMILIES for case in import_module(f"tests.adapters.cases.{family}").CASES
)
BACKBONES: tuple[BackboneCase, ...] = tuple({case.name.split("-")[0]: case for case in reversed(CASES)}.values())[::-1]
