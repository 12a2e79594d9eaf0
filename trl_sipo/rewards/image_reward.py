# SPDX-License-Identifier: Apache-2.0
"""ImageReward (Xu et al. 2023, 2304.05977): what annotators preferred, by BLIP's text encoder looking at the image.

Where the published BLIP and transformers' differ:

- It has 12 attention heads and norms with an epsilon of 1e-6 (vision) and 1e-12 (text); transformers' defaults are 8,
  1e-5 and 1e-12.
- Every layer of the text encoder attends to the image, and every token to all others. In transformers the first is
  the configuration's `is_decoder`, the second the absence of the argument of that name.
- A prompt begins with [CLS]. BLIP's own matching head wants [ENC] there; ImageReward was trained without.
"""

import re
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.base import RewardInfo
from trl_sipo.rewards.batched import BatchedReward
from trl_sipo.rewards.pixels import cropped_pixels
from trl_sipo.rewards.rating_head import head_weights, rating_head
from trl_sipo.rewards.weights import assign_weights, load_tokenizer, read_weights, torch_dtype, weights_file

WEIGHTS_FILE = "ImageReward.pt"
MAX_TOKENS = 35

# Of the raw rewards on the authors' data.
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072

VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {"num_attention_heads": 12, "encoder_hidden_size": 1024}

_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_VISION_PARTS = {
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VISION_LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


class ImageRewardModel(nn.Module):
    """BLIP's vision and text encoders, and a head on the text's first token.

    Args:
        vision: of the vision transformer.
        text: of the text encoder, with `is_decoder`.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig):
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = rating_head(text.hidden_size)

    def forward(self, pixels: torch.Tensor, token_ids: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """Rewards, in deviations from the mean.

        Args:
            pixels: (n, 3, side, side), normalised.
            token_ids: (n, tokens).
            token_mask: (n, tokens), 1 at real tokens, 0 at padding.

        Returns:
            (n,) float32.
        """
        patches = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.text(input_ids=token_ids, attention_mask=token_mask, encoder_hidden_states=patches)
        return (self.head(tokens.last_hidden_state[:, 0].float()).squeeze(-1) - MEAN) / DEVIATION


class ImageReward(BatchedReward):
    """ImageReward 1.0: about 0 on average, from -2.3 to 2.

    Args:
        model: repository of the hub, folder or file with the published weights, a pickle that is read by
            `weights_only`; or an `ImageRewardModel`.
        tokenizer: folder or model id of BERT's uncased tokenizer, or the tokenizer. Prompts are cut off after 35 of
            its tokens.
        revision: of the weights in the hub.
        device: where it computes.
        dtype: of the encoders' weights; the head's are float32.
        batch_size: images at once.
        frames_per_video: see `BatchedReward`.

    Raises:
        ConfigurationError: weights that do not load.
    """

    def __init__(
        self,
        model: str | ImageRewardModel = "THUDM/ImageReward",
        *,
        tokenizer: Any = "google-bert/bert-base-uncased",
        revision: str | None = None,
        device: Any = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
        frames_per_video: int | None = None,
    ):
        if isinstance(model, str):
            file = weights_file(model, WEIGHTS_FILE, revision=revision)
            model = load_image_reward(file, BlipVisionConfig(**VISION), BlipTextConfig(**TEXT))
        self._model = model.to(device=device, dtype=torch_dtype(dtype)).eval()
        self._model.head.float()
        self._tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        super().__init__(
            RewardInfo(name="image_reward", convention="(MLP(BLIP) - 0.167) / 1.033, v1.0", licence="Apache-2.0"),
            models=[self._model.vision, self._model.text, self._model.head],
            tokenizer=self._tokenizer,
            batch_size=batch_size,
            frames_per_video=frames_per_video,
        )

    def score_images(self, images: list[PIL.Image.Image], prompts: list[str]) -> torch.Tensor:
        """(b,) rewards; see `BatchedReward`."""
        vision = self._model.vision
        pixels = cropped_pixels(images, vision.config.image_size).to(vision.device, vision.dtype)
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(vision.device)
        return self._model(pixels, tokens.input_ids, tokens.attention_mask)


def load_image_reward(file: Path, vision: BlipVisionConfig, text: BlipTextConfig) -> ImageRewardModel:
    """The model from a file of the published layout, in eval mode on the CPU.

    Raises:
        ConfigurationError: the file cannot be read, or holds another network.
    """
    with init_empty_weights():
        model = ImageRewardModel(vision, text)
    assign_weights(model, from_published(read_weights(file)), source=str(file))
    return model.eval()


def from_published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by our names, from a checkpoint of the authors' code. BLIP's unused projections are left out.

    Raises:
        ConfigurationError: a name that its vision transformer does not have.
    """
    text = head_weights(weights, "blip.text_encoder.")
    converted = {f"text.{name}": value for name, value in text.items() if not name.endswith("position_ids")}
    for name, value in head_weights(weights, "blip.visual_encoder.").items():
        converted[f"vision.{_vision_name(name)}"] = value
    for name, value in head_weights(weights, "mlp.layers.").items():
        converted[f"head.{name}"] = value
    return converted


def _vision_name(name: str) -> str:
    layer = _VISION_LAYER.fullmatch(name)
    if layer is not None and layer[2] in _VISION_PARTS:
        return f"encoder.layers.{layer[1]}.{_VISION_PARTS[layer[2]]}.{layer[3]}"
    if name not in _VISION_NAMES:
        raise ConfigurationError(f"'blip.visual_encoder.{name}' is no weight of BLIP's vision transformer.")
    return _VISION_NAMES[name]
