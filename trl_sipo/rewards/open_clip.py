# SPDX-License-Identifier: Apache-2.0
"""Weights of open_clip as a CLIP model of transformers.

The networks are the same, with two differences of storage: open_clip keeps query, key and value of an attention in one
matrix, and its projections are multiplied from the other side.
"""

import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import CLIPConfig, CLIPModel

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.weights import assign_weights, read_weights

# open_clip's ViT-H-14: the exact GELU, and not OpenAI's quick one, which is transformers' default.
VIT_H_14 = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}

_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # so spelled by transformers
    "visual.ln_post": "vision_model.post_layernorm",
}
_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = {"text_projection", "visual.proj"}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def load_open_clip(file: Path, config: CLIPConfig) -> CLIPModel:
    """A CLIP model from a file of open_clip's weights, in eval mode on the CPU, in the file's precision.

    Args:
        file: safetensors, or a checkpoint of PyTorch, read by `weights_only`.
        config: of the network that the weights belong to.

    Raises:
        ConfigurationError: the file cannot be read, or holds another network.
    """
    with init_empty_weights():
        model = CLIPModel(config)
    assign_weights(model, from_open_clip(read_weights(file)), source=str(file))
    return model.eval()


def from_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by transformers' names, from weights by open_clip's.

    Raises:
        ConfigurationError: a name that open_clip's CLIP with a vision transformer does not have.
    """
    converted: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        converted.update(_converted(name, value))
    return converted


def _converted(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    if name in _NAMES:
        return {_NAMES[name]: value.T.contiguous() if name in _TRANSPOSED else value}
    module, _, kind = name.rpartition(".")
    if module in _NORMS:
        return {f"{_NORMS[module]}.{kind}": value}
    layer = _LAYER.fullmatch(name)
    if layer is not None:
        tower = "vision_model" if layer[1] else "text_model"
        prefix, part, kind = f"{tower}.encoder.layers.{layer[2]}", layer[3], layer[4]
        if part in _PARTS:
            return {f"{prefix}.{_PARTS[part]}.{kind}": value}
        if part == "attn.in_proj" and value.ndim and len(value) and len(value) % 3 == 0:
            thirds = zip("qkv", value.chunk(3), strict=True)
            return {f"{prefix}.self_attn.{letter}_proj.{kind}": third.contiguous() for letter, third in thirds}
    raise ConfigurationError(f"{name!r} is no weight of an open_clip model with a vision transformer.")
