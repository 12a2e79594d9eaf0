# SPDX-License-Identifier: Apache-2.0
"""LoRA files that plain diffusers loads as exactly the trained model, and back.

The file carries PEFT's adapter configuration in its metadata. Without it `load_lora_weights` assumes alpha = rank and
gives another model than the one that was trained, without a word.
"""

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trl_sipo.adapters.wrappers import find_peft_model
from trl_sipo.errors import BackboneError, ConfigurationError

ADAPTER_NAME = "default"
LORA_FILE_NAME = "pytorch_lora_weights.safetensors"

_METADATA_KEY = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
# Not every pipeline has LoRA methods; every denoiser has.
_DENOISER = "the denoiser (pipeline.unet, pipeline.transformer, ...)"
# The others (pissa, olora, corda, loftq, lora_ga, ...) change the base weights, so the LoRA alone is not the model.
_EXPORTABLE_INITS = (True, False, "gaussian", "orthogonal")
# With these equal, and the same layers, two adapters compute the same function of the same weights.
_DEFINING_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")


def check_exportable(denoiser: nn.Module) -> PeftModel:
    """The PEFT model of a denoiser, if a diffusers LoRA file can express its adapter `"default"`.

    To be called before training, so that a run does not end with a model that cannot be saved.

    Raises:
        ConfigurationError: if there is no PEFT model or no such adapter, or its configuration trains or changes more
            than LoRA matrices.
    """
    model = find_peft_model(denoiser)
    if model is None:
        raise ConfigurationError(
            f"A LoRA is saved from and loaded into a PEFT model, not a {type(denoiser).__name__}. Wrap the denoiser "
            "with peft.get_peft_model, or save the whole pipeline."
        )
    config: Any = model.peft_config.get(ADAPTER_NAME)
    if config is None:
        raise ConfigurationError(
            f"The PEFT model has the adapters {sorted(model.peft_config)}, but the trained one must be named "
            f"{ADAPTER_NAME!r}: leave out adapter_name in get_peft_model."
        )
    if config.peft_type != PeftType.LORA:
        raise ConfigurationError(f"The adapter is {config.peft_type}; only LoRA is supported. Use a peft.LoraConfig.")
    if config.init_lora_weights not in _EXPORTABLE_INITS:
        raise ConfigurationError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported: such initialisations change the base "
            f"weights, so that the saved LoRA alone is not the trained model. Use one of {_EXPORTABLE_INITS}."
        )
    for field, neutral in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
        value = getattr(config, field, neutral)
        if value not in (neutral, []):
            raise ConfigurationError(
                f"{field}={value!r} trains weights that a diffusers LoRA file cannot hold. Leave it at {neutral!r}; "
                "further layers can be named in target_modules."
            )
    return model


def save_lora(pipeline_class: Any, denoiser_name: str, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `<directory>/pytorch_lora_weights.safetensors`, whole or not at all.

    Weights keep their dtype in the file. diffusers rounds them to the denoiser's dtype when it loads them, so equality
    with the trained model is to the bit for a float32 pipeline, and up to this rounding for others.

    Args:
        pipeline_class: the pipeline's class, whose `save_lora_weights` writes the file, where it has one.
        denoiser_name: component name of the denoiser, which prefixes the keys.
        denoiser: a PEFT model, under any wrapper, with an adapter `"default"`.
        directory: created if missing.

    Raises:
        ConfigurationError: as [`check_exportable`].
    """
    model = check_exportable(denoiser)
    layers = lora_state_dict(model)
    if denoiser_name == "unet":
        layers = _conventional_unet_keys(layers)
    loras = {LORA_FILE_NAME: (layers, model.peft_config[ADAPTER_NAME])}
    write_lora_files(pipeline_class, denoiser_name, loras, directory)


def write_lora_files(
    pipeline_class: Any,
    component_name: str,
    loras: Mapping[str, tuple[dict[str, Tensor], PeftConfig] | None],
    directory: str | os.PathLike[str],
) -> None:
    """Write LoRAs of one kind of component, weights and configuration of each by the name of its file.

    All are written before any takes its place, so that a save that fails leaves the earlier files, or none. None in
    place of a LoRA: the component has none, so that its file of an earlier save goes. Other arguments as in
    [`save_lora`].
    """
    writer, target = _lora_writer(pipeline_class), Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        written = {file_name: lora for file_name, lora in loras.items() if lora is not None}
        for file_name, (layers, config) in written.items():
            # diffusers adds the layers in train mode to a pipeline in eval mode: with dropout, inference would be
            # random.
            metadata = {**config.to_dict(), "lora_dropout": 0.0}
            weights = {key: value.detach().cpu().contiguous() for key, value in layers.items()}
            arguments = {f"{component_name}_lora_layers": weights, f"{component_name}_lora_adapter_metadata": metadata}
            writer.save_lora_weights(temporary, weight_name=file_name, **arguments)
        # First, so that an interruption here does not leave the new files beside it.
        for file_name in loras.keys() - written.keys():
            (target / file_name).unlink(missing_ok=True)
        for file_name in written:
            os.replace(Path(temporary) / file_name, target / file_name)


def _lora_writer(pipeline_class: Any) -> Any:
    """The class whose `save_lora_weights` writes the file.

    A pipeline without LoRA methods gets the file of any other transformer, which the denoiser itself loads:
    `pipeline.transformer.load_lora_adapter(directory, use_safetensors=True)`.
    """
    return pipeline_class if hasattr(pipeline_class, "save_lora_weights") else HunyuanVideoLoraLoaderMixin


def load_lora(denoiser_name: str, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Restore adapter `"default"`, in place and to the bit, from the file that [`save_lora`] wrote.

    Raises:
        BackboneError: if the file is missing or unreadable, or its adapter differs from the one in training.
        ConfigurationError: as [`check_exportable`].
    """
    model = check_exportable(denoiser)
    path = Path(directory) / LORA_FILE_NAME
    weights = read_lora_file(path, denoiser_name, lora_state_dict(model), model.peft_config[ADAPTER_NAME])
    restore_lora(model, weights)


def read_lora_file(
    path: Path, component_name: str, expected: dict[str, Tensor], config: PeftConfig
) -> dict[str, Tensor]:
    """The weights of one component, by the names of `expected`.

    Args:
        expected: the LoRA in training, whose layers and shapes the file must have.
        config: the configuration in training, which the file's must equal.

    Raises:
        BackboneError: as [`load_lora`].
    """
    saved, saved_config = _parse_lora_file(path, component_name)
    _check_same_config(path, saved_config, config)
    if saved.keys() != expected.keys():
        missing, unexpected = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
        raise BackboneError(
            f"{path} holds a LoRA of other layers than the one in training: {len(missing)} weights are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} are unknown ({', '.join(unexpected[:3])}). Use the "
            "target_modules it was trained with."
        )
    for key, value in saved.items():
        if value.shape != expected[key].shape:
            raise BackboneError(
                f"{path}: {key} has the shape {tuple(value.shape)}, but the LoRA in training has "
                f"{tuple(expected[key].shape)}. It was trained on another base model."
            )
    return saved


def restore_lora(model: PeftModel, weights: dict[str, Tensor]) -> None:
    """Give adapter `"default"` these weights, named as in [`lora_state_dict`], in place."""
    set_peft_model_state_dict(model, {_PEFT_PREFIX + key: value for key, value in weights.items()}, ADAPTER_NAME)


def adopt_injected_lora(denoiser: nn.Module) -> PeftModel:
    """A PEFT model around a denoiser in which diffusers injected a LoRA.

    The injected layers are taken out of `denoiser` and put back through PEFT with the same weights and configuration,
    as the trainable adapter `"default"`, so that the outputs do not change. Half-precision weights become float32.

    Raises:
        ConfigurationError: if there is not exactly one injected adapter, or it is fused, rescaled or switched off.
    """
    configs = getattr(denoiser, "peft_config", None) or {}
    if isinstance(denoiser, PeftModel) or len(configs) != 1:
        raise ConfigurationError(
            "Training continues exactly one LoRA that diffusers loaded into the denoiser, but the "
            f"{type(denoiser).__name__} has {sorted(configs) or 'none'}. Load one, or fuse and unload the others."
        )
    (name, config), *_ = configs.items()
    layers = {key: module for key, module in denoiser.named_modules() if isinstance(module, LoraLayer)}
    _check_adoptable(name, layers)
    weights = get_peft_model_state_dict(denoiser, adapter_name=name, save_embedding_layers=False)
    weights = {_PEFT_PREFIX + key: value.detach().clone() for key, value in weights.items()}

    config = copy.deepcopy(config)
    config.inference_mode = False
    unload = getattr(denoiser, "unload_lora")  # noqa: B009 - a method of diffusers' models, unknown to nn.Module
    unload()
    model = _wrap_layers(denoiser, config, set(layers))
    set_peft_model_state_dict(model, weights, ADAPTER_NAME)
    check_exportable(model)
    return model


def lora_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """Weights of adapter `"default"` by the names of the layers in the denoiser, `<layer>.lora_A.weight` and so on."""
    # Not "auto" for the embeddings: PEFT would then ask the Hub for the base model's configuration.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    return {key.removeprefix(_PEFT_PREFIX): value for key, value in state.items()}


def _conventional_unet_keys(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """`lora.down`/`lora.up`, the names of UNet files, if every layer has such a name.

    diffusers converts attention projections only, and its loader decides by the first key how all of them are named,
    so a mixture may not load. A file in PEFT's names throughout does.
    """
    converted = convert_state_dict_to_diffusers(dict(layers))
    return layers if any(".lora_A." in key or ".lora_B." in key for key in converted) else converted


def _parse_lora_file(path: Path, denoiser_name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by PEFT's names, and the adapter configuration, of one component."""
    prefix = f"{denoiser_name}."
    if not path.is_file():
        raise BackboneError(f"There is no LoRA to load: {path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}")))
            weights = {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise BackboneError(f"{path} cannot be read as a LoRA file: {error}") from error
    config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not config:
        raise BackboneError(
            f"{path} has no adapter metadata for the {denoiser_name}, so its alpha is not known: another tool wrote "
            "it. Load it into the pipeline with diffusers and train that pipeline."
        )
    renamed = {
        key.removeprefix(prefix).replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): value
        for key, value in weights.items()
    }
    return renamed, config


def _check_same_config(path: Path, saved: dict[str, Any], current: PeftConfig) -> None:
    for field in _DEFINING_FIELDS:
        if field in saved and saved[field] != (value := getattr(current, field)):
            raise BackboneError(
                f"{path} was trained with {field}={saved[field]!r}, but the LoRA in training has {field}={value!r}. "
                "Use the same peft_config to resume."
            )


def _check_adoptable(name: str, layers: dict[str, LoraLayer]) -> None:
    for key, layer in layers.items():
        if layer.merged:
            raise ConfigurationError(
                f"The LoRA {name!r} is fused: call unfuse_lora() of {_DENOISER} to train it further."
            )
        if layer.disable_adapters or name not in layer.active_adapters:
            raise ConfigurationError(
                f"The LoRA {name!r} is loaded but switched off: call enable_lora() and set_adapters({name!r}) of "
                f"{_DENOISER} to train it."
            )
        rank = layer.r[name]
        scaling = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank)
        if not math.isclose(layer.scaling[name], scaling, rel_tol=1e-6):
            raise ConfigurationError(
                f"The LoRA {name!r} is scaled by {layer.scaling[name] / scaling:.4g} in {key}, which a LoRA file "
                f"cannot express: call set_adapters({name!r}, 1.0) of {_DENOISER}."
            )


def _wrap_layers(denoiser: nn.Module, config: LoraConfig, names: set[str]) -> PeftModel:
    """`get_peft_model` with LoRA in exactly the layers named, whatever else the configuration would match."""
    model = get_peft_model(denoiser, config, adapter_name=ADAPTER_NAME)
    if {key for key, module in denoiser.named_modules() if isinstance(module, LoraLayer)} == names:
        return model
    config.target_modules = "|".join(re.escape(name) for name in sorted(names))
    config.exclude_modules = None
    config.layers_to_transform = config.layers_pattern = None
    model = get_peft_model(model.unload(), config, adapter_name=ADAPTER_NAME)
    assert {key for key, module in denoiser.named_modules() if isinstance(module, LoraLayer)} == names
    return model
