# SPDX-License-Identifier: Apache-2.0
"""A model as far as its cost depends on it, without weights: from a table of published ones, or its configuration.

Everything is built on PyTorch's meta device, where tensors have a shape and no data.
"""

import dataclasses
import importlib
import inspect
import os
from dataclasses import dataclass, field
from typing import Any, cast

import diffusers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_sipo.adapters import ADAPTERS, adapter_for, denoiser_names
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.adapters.weightless import ENCODER_NAMES, weightless_component
from trl_sipo.cost.architectures import ARCHITECTURES, FROZEN, HUB_MODELS, Architecture, default_dtype
from trl_sipo.errors import BackboneError, ConfigurationError

PUBLISHED, CONFIGURED = "published configuration", "configuration files"

Size = tuple[int | None, int | None, int | None]
"""Height and width in pixels and number of frames; `None`: the model's own."""


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights.

    Attributes:
        name: As the user gave it.
        architecture: Its denoiser, at the size in question.
        vae: On the meta device.
        text_encoders: On the meta device.
        lora_targets: The layers that a LoRA goes into if the user names none.
        num_denoisers: Two of Wan 2.2 A14B, of which a sample passes one.
        source: `PUBLISHED` or `CONFIGURED`.
    """

    name: str
    architecture: Architecture
    vae: nn.Module = field(repr=False)
    text_encoders: tuple[nn.Module, ...] = field(repr=False)
    lora_targets: list[str] | str
    num_denoisers: int
    source: str


_ABOUT_IMAGES = ("safety_checker", "feature_extractor", "image_encoder")
# As its call gives them to the denoiser, by class of the pipeline; the longest possible where the prompt counts.
_TEXT_TOKENS = {architecture.pipeline: architecture.text_tokens for architecture in ARCHITECTURES.values()}


def find_model(name: str, size: Size = (None, None, None), **hub_kwargs: Any) -> Model:
    """A model of the table by its hub id, or any other by its configuration files.

    A hub id of the table is not looked up; of another one the configuration is downloaded, and no weights.

    Args:
        name: Hub id, or a folder that `save_pretrained` wrote; of it the weights may be missing.
        size: Height and width in pixels and number of frames; `None`: the model's own.
        hub_kwargs: `revision` and the like.

    Raises:
        BackboneError: There is no such model, or one that no adapter knows.
        ConfigurationError: The model does not take the size.
    """
    known = HUB_MODELS.get(name)
    if known is not None and not os.path.isdir(name) and not any(hub_kwargs.values()):
        key, num_denoisers = known
        return dataclasses.replace(published_model(key, size), name=name, num_denoisers=num_denoisers)
    return configured_model(name, size, **hub_kwargs)


def published_model(key: str, size: Size = (None, None, None)) -> Model:
    """The model of a key of `ARCHITECTURES`.

    Raises:
        ConfigurationError: It does not take the size.
    """
    architecture = at_size(ARCHITECTURES[key], size)
    vae, *text_encoders = [frozen_module(part) for part in architecture.frozen]
    targets = adapter_class(architecture.pipeline).lora_target_modules
    return Model(
        name=key,
        architecture=architecture,
        vae=vae,
        text_encoders=tuple(text_encoders),
        lora_targets=targets if isinstance(targets, str) else list(targets),
        num_denoisers=1,
        source=PUBLISHED,
    )


def at_size(architecture: Architecture, size: Size) -> Architecture:
    """The same model on samples of another size, in pixels and frames; `None` keeps one.

    Raises:
        ConfigurationError: The size is no multiple of what one number of the latents stands for.
    """
    own, latents = architecture.size, architecture.latents
    height, width, frames = (value if given is None else given for given, value in zip(size, own, strict=True))
    scale = own[0] // latents[-2]
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 1 or pixels % scale:
            raise ConfigurationError(f"`resolution`: the {name} {pixels} is no multiple of {scale}.")
    spatial = (height // scale, width // scale)
    if len(latents) == 3:
        if frames != 1:
            raise ConfigurationError(
                f"`num_frames` is {frames}, but {architecture.pipeline} draws images: set it to 1."
            )
        return dataclasses.replace(architecture, size=(height, width, 1), latents=(latents[0], *spatial))
    step = (own[2] - 1) // (latents[1] - 1) if latents[1] > 1 else 1
    if frames < 1 or (frames - 1) % step:
        raise ConfigurationError(f"`num_frames` is {frames}, which is not one more than a multiple of {step}.")
    shape = (latents[0], (frames - 1) // step + 1, *spatial)
    return dataclasses.replace(architecture, size=(height, width, frames), latents=shape)


def configured_model(name: str, size: Size = (None, None, None), **hub_kwargs: Any) -> Model:
    """Any model that an adapter knows, from its configuration files.

    Raises:
        BackboneError: There is no such model, or one that no adapter knows.
        ConfigurationError: It does not take the size.
    """
    adapter = adapter_for(_weightless_pipeline(os.path.expanduser(name), hub_kwargs))
    height, width = adapter.default_size if None in size[:2] else size[:2]
    frames = adapter.default_num_frames if size[2] is None else size[2]
    experts = getattr(adapter.denoiser, "experts", None)
    denoiser: Any = adapter.denoiser if experts is None else next(iter(experts.values()))
    targets = adapter.lora_target_modules
    return Model(
        name=name,
        architecture=Architecture(
            pipeline=adapter.pipeline_class_name,
            denoiser=type(denoiser).__name__,
            parameters=sum(parameter.numel() for parameter in denoiser.parameters()) / 1e9,
            size=(height, width, frames),
            latents=_with_frames(adapter, adapter.latent_shape(height, width, frames)),
            text_tokens=_TEXT_TOKENS[adapter.pipeline_class_name],
            config=_own_configuration(denoiser),
        ),
        vae=adapter.pipeline.vae,
        text_encoders=tuple(
            module
            for part in adapter.frozen_names
            if part != "vae" and (module := getattr(adapter.pipeline, part)) is not None
        ),
        lora_targets=targets if isinstance(targets, str) else list(targets),
        num_denoisers=1 if experts is None else len(experts),
        source=CONFIGURED,
    )


def _with_frames(adapter: BackboneAdapter, latents: tuple[int, ...]) -> tuple[int, ...]:
    """(C, 1, h, w) of an image model whose VAE and denoiser take videos (Qwen-Image)."""
    has_frames = any(
        len(known.latents) == 4 for known in ARCHITECTURES.values() if known.pipeline == adapter.pipeline_class_name
    )
    return (latents[0], 1, *latents[1:]) if has_frames and len(latents) == 3 else latents


def _weightless_pipeline(name: str, hub_kwargs: dict[str, Any]) -> Any:
    """A saved pipeline whose models have no weights. What looks at finished images is left out.

    Not by its `from_pretrained`, which reads the weights of components that a pipeline may do without, such as Wan's
    transformer, even where they are given.
    """
    models = {*denoiser_names(name, revision=hub_kwargs.get("revision")), *ENCODER_NAMES}  # checks the class, too
    index = cast(Any, diffusers.DiffusionPipeline).load_config(name, **hub_kwargs)
    pipeline_class = getattr(diffusers, index["_class_name"])
    parts: dict[str, Any] = {}
    for part in set(inspect.signature(pipeline_class.__init__).parameters) & index.keys():
        origin = index[part]
        if not isinstance(origin, list):
            parts[part] = origin  # a setting
        elif origin == [None, None] or part in _ABOUT_IMAGES:
            parts[part] = None
        elif not (len(origin) == 2 and all(isinstance(word, str) for word in origin)):
            raise BackboneError(
                f"model_index.json of {name!r} says of {part}: {origin!r:.80}; it takes library and class."
            )
        elif part in models:
            parts[part] = weightless_component(name, part, origin, hub_kwargs)
        else:
            parts[part] = _small_component(name, part, origin, hub_kwargs)
    return pipeline_class(**parts)


def _small_component(name: str, part: str, origin: list[str], hub_kwargs: dict[str, Any]) -> Any:
    """A scheduler, tokenizer, processor or guider: anything of the libraries that has no weights.

    Raises:
        BackboneError: It cannot be read.
    """
    library, class_name = origin
    component_class = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), class_name, None)
    is_module = isinstance(component_class, type) and issubclass(component_class, nn.Module)
    if is_module or not hasattr(component_class, "from_pretrained"):
        raise BackboneError(f"The {part} of {name!r} is a {class_name!r:.80} of {library!r:.80}, which is not known.")
    try:
        return cast(Any, component_class).from_pretrained(name, subfolder=part, **hub_kwargs)
    except Exception as error:  # of settings that make no sense the libraries raise errors of any kind
        raise BackboneError(
            f"The {part} of {name!r} cannot be read, which the cost needs beside the configurations: {error}"
        ) from error


def _own_configuration(module: Any) -> dict[str, Any]:
    """What a module of the same kind is made from."""
    names = inspect.signature(type(module).__init__).parameters
    return {name: value for name, value in module.config.items() if name in names}


def guidance_passes(architecture: Architecture) -> int:
    """Passes of the denoiser in a step of a sampler with guidance: one if the model is told the scale, else two."""
    setting = inspect.signature(getattr(diffusers, architecture.denoiser).__init__).parameters.get("guidance_embeds")
    is_told = architecture.config.get("guidance_embeds", setting is not None and setting.default is True)
    return 1 if is_told else 2


def adapter_class(pipeline: str) -> type[BackboneAdapter]:
    """The class in the adapter's module that is for this class of pipeline."""
    module = importlib.import_module(ADAPTERS[pipeline].split(":")[0])
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return next(found for found in classes if getattr(found, "pipeline_class_name", None) == pipeline)


def frozen_module(part: str) -> nn.Module:
    """A VAE or text encoder of `FROZEN`, on the meta device."""
    library, class_name, options, _ = FROZEN[part]
    module_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    with torch.device("meta"):
        is_encoder = library == "transformers"
        return module_class(module_class.config_class(**options)) if is_encoder else module_class(**options)


def num_parameters(*modules: nn.Module) -> int:
    """Of all of them."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def make_denoiser(architecture: Architecture, device: str, dtype: torch.dtype) -> nn.Module:
    """With random weights, or on the device "meta" with none."""
    with default_dtype(dtype), torch.device(device):
        return getattr(diffusers, architecture.denoiser)(**architecture.config)


def add_lora(denoiser: nn.Module, targets: list[str] | str, rank: int) -> nn.Module:
    """A LoRA around a denoiser that is frozen from then on; its matrices are float32."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    return get_peft_model(denoiser.requires_grad_(False), config)
