# SPDX-License-Identifier: Apache-2.0
"""The two transformers of Wan 2.2 A14B as one module, and their LoRA files.

Each sample goes to the expert of its own noise level, so that whoever trains the module need not know of the two. PEFT
wraps it once: the names of its layers begin with `transformer.` and `transformer_2.`, as in the pipeline.
"""

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trl_sipo.adapters import lora
from trl_sipo.adapters.wrappers import unwrap_denoiser
from trl_sipo.errors import ConfigurationError

# Component of the pipeline to its LoRA file. To diffusers both files are of a "transformer".
LORA_FILES = {"transformer": lora.LORA_FILE_NAME, "transformer_2": "pytorch_lora_weights_2.safetensors"}
_NAME_IN_FILES = "transformer"
_EQUAL_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")


class WanExperts(nn.Module):
    """One denoiser made of two: `transformer` takes the noisier levels, `transformer_2` the others.

    Args:
        transformer: the expert of timesteps from `boundary_timestep` up, None if it is not loaded.
        transformer_2: the expert of those below, None if it is not loaded.
        boundary_timestep: `boundary_ratio` of the pipeline, times the number of training timesteps.
    """

    def __init__(self, transformer: nn.Module | None, transformer_2: nn.Module | None, boundary_timestep: float):
        super().__init__()
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.boundary_timestep = boundary_timestep
        configs = {name: dict(expert.config) for name, expert in self.experts.items()}
        self._internal_dict = FrozenDict({"boundary_timestep": boundary_timestep, **configs})

    @property
    def experts(self) -> dict[str, Any]:
        """The experts that are loaded, by their names in the pipeline."""
        return {name: expert for name in LORA_FILES if (expert := getattr(self, name)) is not None}

    @property
    def config(self) -> FrozenDict:
        """The experts' configurations by name, for trackers; kept where diffusers' models keep theirs."""
        return self._internal_dict

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first expert, which is the one that the pipeline casts the inputs of both to."""
        return next(iter(self.experts.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the first expert."""
        return next(iter(self.experts.values())).device

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The LoRAs injected in the experts, by name: the attribute in which PEFT and diffusers keep them.

        Raises:
            ConfigurationError: if the experts carry LoRAs that one configuration does not describe.
        """
        configs = [config for expert in self.experts.values() if (config := getattr(expert, "peft_config", None))]
        if not configs:
            raise AttributeError("no expert carries a LoRA")
        for other in configs[1:]:
            _check_same_loras(configs[0], other)
        return configs[0]

    @peft_config.setter
    def peft_config(self, configs: dict[str, LoraConfig]) -> None:
        for expert in self.experts.values():
            expert.peft_config = configs

    @peft_config.deleter
    def peft_config(self) -> None:
        for expert in self.experts.values():
            if hasattr(expert, "peft_config"):
                del expert.peft_config

    def unload_lora(self) -> None:
        """Take out the LoRAs that diffusers injected."""
        for expert in self.experts.values():
            expert.unload_lora()

    def enable_gradient_checkpointing(self, checkpoint: Callable[..., Any] | None = None) -> None:
        """Recompute the activations of both experts in the backward pass, by `checkpoint` or torch's own."""
        for expert in self.experts.values():
            expert.enable_gradient_checkpointing(checkpoint)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether [`enable_gradient_checkpointing`] is in force."""
        return all(expert.is_gradient_checkpointing for expert in self.experts.values())

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Each sample through its expert, or all through the only one, the results in the order of the samples.

        Args:
            hidden_states: (batch, ...).
            timestep: (batch,), or (batch, tokens) with one value per sample.
            encoder_hidden_states: (batch, tokens, dim).
            return_dict: False; there because diffusers' models have it.
        """
        assert not return_dict, "the experts return a tuple"
        outputs = []
        rows = self._rows_of_experts(timestep)
        for expert, index in rows:
            inputs = (hidden_states[index], timestep[index], encoder_hidden_states[index])
            outputs.append(expert(*inputs, return_dict=False)[0])
        order = torch.cat([index for _, index in rows]).argsort()
        return (torch.cat(outputs)[order],)

    def _rows_of_experts(self, timestep: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """The experts that these samples need, each with the indices of its samples."""
        if self.transformer is None or self.transformer_2 is None:
            (expert,) = self.experts.values()
            return [(expert, torch.arange(len(timestep), device=timestep.device))]
        is_noisy = timestep.reshape(len(timestep), -1)[:, 0] >= self.boundary_timestep
        experts = (self.transformer, is_noisy), (self.transformer_2, ~is_noisy)
        return [(expert, mask.nonzero().flatten()) for expert, mask in experts if mask.any()]


def save_experts_lora(pipeline_class: Any, denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write one LoRA file per expert that carries one; see `LORA_FILES` and [`lora.save_lora`].

    The file of an expert that is loaded and carries none is removed: an earlier save's LoRA is no part of this model.
    That of an expert that is not loaded stays, since the two may be trained one after the other.
    """
    model = lora.check_exportable(denoiser)
    weights, configs = lora.lora_state_dict(model), _configs_of_experts(model)
    loras = {
        LORA_FILES[name]: (_of_expert(weights, name), configs[name]) if name in configs else None
        for name in unwrap_denoiser(model).experts
    }
    lora.write_lora_files(pipeline_class, _NAME_IN_FILES, loras, directory)


def load_experts_lora(denoiser: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Restore adapter `"default"` of both experts, in place, from the files that [`save_experts_lora`] wrote.

    Raises:
        BackboneError, ConfigurationError: as [`lora.load_lora`].
    """
    model = lora.check_exportable(denoiser)
    weights, saved = lora.lora_state_dict(model), {}
    for name, config in _configs_of_experts(model).items():
        path = Path(directory) / LORA_FILES[name]
        of_expert = lora.read_lora_file(path, _NAME_IN_FILES, _of_expert(weights, name), config)
        saved.update({f"{name}.{key}": value for key, value in of_expert.items()})
    lora.restore_lora(model, saved)


def _of_expert(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def _configs_of_experts(model: PeftModel) -> dict[str, LoraConfig]:
    """The adapter's configuration as it is for each expert alone, by name; experts without a LoRA are left out.

    Layers, ranks and alphas are spelled out, since the patterns of the whole may speak of `transformer_2.`, which no
    layer inside that expert is called.
    """
    configs = {}
    for name, expert in unwrap_denoiser(model).experts.items():
        layers = {key: module for key, module in expert.named_modules() if isinstance(module, LoraLayer)}
        config: Any = copy.deepcopy(model.peft_config[lora.ADAPTER_NAME])
        ranks = {re.escape(key): layer.r[lora.ADAPTER_NAME] for key, layer in layers.items()}
        alphas = {re.escape(key): layer.lora_alpha[lora.ADAPTER_NAME] for key, layer in layers.items()}
        config.target_modules = sorted(layers)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha}
        if layers:
            configs[name] = config
    return configs


def _check_same_loras(first: dict[str, Any], second: dict[str, Any]) -> None:
    if first.keys() != second.keys():
        raise ConfigurationError(
            f"The LoRAs of the two experts are named {sorted(first)} and {sorted(second)}. To train them together, "
            "give the same adapter_name to both calls of pipeline.load_lora_weights."
        )
    for name, config in first.items():
        for field in _EQUAL_FIELDS:
            if (one := getattr(config, field)) != (other := getattr(second[name], field)):
                raise ConfigurationError(
                    f"The LoRAs of the two experts have {field}={one!r} and {other!r}, but are trained as one. Train "
                    "them one at a time (load the pipeline with transformer=None or transformer_2=None)."
                )
