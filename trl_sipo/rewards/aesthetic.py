# SPDX-License-Identifier: Apache-2.0
"""LAION's aesthetic predictor, version 2 (sac+logos+ava1-l14-linearMSE): how people would rate an image, 1 to 10."""

from typing import Any

import PIL.Image
import torch
from torch import nn
from transformers import CLIPVisionModelWithProjection

from trl_sipo.rewards.base import RewardInfo
from trl_sipo.rewards.batched import BatchedReward
from trl_sipo.rewards.pixels import cropped_pixels
from trl_sipo.rewards.rating_head import head_weights, rating_head
from trl_sipo.rewards.weights import assign_weights, load_model, read_weights, torch_dtype, weights_file

HEAD_FILE = "model.safetensors"


class AestheticScore(BatchedReward):
    """An affine map of the normalised image embedding of CLIP ViT-L/14. The prompt plays no part.

    Args:
        model: folder or model id of the CLIP model, or its vision model with projection.
        head: file, folder or repository of the hub with the head's weights, or the head. The default is a copy of the
            published ones as safetensors; the original, `sac+logos+ava1-l14-linearMSE.pth`, is a pickle, read by
            `weights_only`.
        revision: of the model in the hub.
        device: where it computes.
        dtype: of the model's weights; the head's are float32.
        batch_size: images at once.
        frames_per_video: see `BatchedReward`.

    Raises:
        ConfigurationError: weights that do not load, or that do not fit the model.
    """

    def __init__(
        self,
        model: str | CLIPVisionModelWithProjection = "openai/clip-vit-large-patch14",
        *,
        head: str | nn.Module = "ttj/sac-logos-ava1-l14-linearMSE",
        revision: str | None = None,
        device: Any = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 32,
        frames_per_video: int | None = None,
    ):
        if isinstance(model, str):
            model = load_model(CLIPVisionModelWithProjection, model, revision=revision, dtype=dtype)
        self._model = model.to(device=device, dtype=torch_dtype(dtype)).eval()
        if isinstance(head, str):
            head = load_head(head, model.config.projection_dim)
        self._head = head.to(device=device, dtype=torch.float32).eval()
        super().__init__(
            RewardInfo(name="aesthetic", convention="MLP(image / |image|), LAION v2", licence="Apache-2.0"),
            models=[self._model, self._head],
            batch_size=batch_size,
            frames_per_video=frames_per_video,
        )

    def score_images(self, images: list[PIL.Image.Image], prompts: list[str]) -> torch.Tensor:
        """(b,) ratings; see `BatchedReward`."""
        pixels = cropped_pixels(images, self._model.config.image_size)
        embeddings = self._model(pixel_values=pixels.to(self._model.device, self._model.dtype)).image_embeds
        return self._head(nn.functional.normalize(embeddings.float(), dim=-1)).squeeze(-1)


def load_head(name: str, width: int) -> nn.Sequential:
    """The published head, of embeddings of `width`.

    Raises:
        ConfigurationError: it is not there, or another one.
    """
    file = weights_file(name, HEAD_FILE, revision=None)
    head = rating_head(width)
    assign_weights(head, head_weights(read_weights(file), "layers."), source=str(file))
    return head
