# SPDX-License-Identifier: Apache-2.0
"""Embeddings of images and prompts by a CLIP model of transformers, and the cosine between them."""

import html
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPModel

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.weights import load_model, load_tokenizer, torch_dtype


class CLIPEncoder:
    """A CLIP model and its tokenizer.

    Args:
        model: in eval mode.
        tokenizer: of transformers.
        unescape: whether `&amp;` and its like in prompts are resolved first, as OpenAI's and open_clip's tokenizers
            do and transformers' does not. (Both also mend broken encodings by ftfy; that is left out.)
        device: where it computes.
        dtype: of the weights; cosines are taken in float32.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: Any, *, unescape: bool, device: Any, dtype: str | torch.dtype = "float32"
    ):
        self.model = model.to(device=device, dtype=torch_dtype(dtype)).eval()
        self.tokenizer, self.unescape = tokenizer, unescape

    @property
    def side(self) -> int:
        """Of the square images that it takes, in pixels."""
        return self.model.config.vision_config.image_size

    def cosine(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The cosine of each image and its prompt.

        Args:
            pixels: (n, 3, side, side) float32, normalised.
            prompts: n of them; cut off after the tokens that the model has positions for (77).

        Returns:
            (n,) float32 in [-1, 1], on the model's device.
        """
        return (self.images(pixels) * self._texts(prompts)).sum(-1)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings of length 1, (n, width) float32 on the model's device; `pixels` as for [`cosine`]."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def _texts(self, prompts: Sequence[str]) -> torch.Tensor:
        if self.unescape:  # twice, as they do
            prompts = [html.unescape(html.unescape(prompt)) for prompt in prompts]
        # Always as many tokens, so that a score does not depend on the other prompts of its batch.
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return _unit(features.pooler_output)


def load_encoder(
    model: str | CLIPModel,
    tokenizer: Any,
    *,
    revision: str | None,
    unescape: bool,
    device: Any,
    dtype: str | torch.dtype,
) -> CLIPEncoder:
    """A CLIP encoder from what a user gave.

    Args:
        model: folder, model id of the hub, or the model itself.
        tokenizer: the same of the tokenizer; None takes the one that lies with the model.
        revision: of the model in the hub.
        unescape: see `CLIPEncoder`.
        device: where it computes.
        dtype: of the weights.

    Raises:
        ConfigurationError: it does not load, or a model was given without its tokenizer.
    """
    if tokenizer is None:
        if not isinstance(model, str):
            raise ConfigurationError("A CLIP model that is given as an object needs `tokenizer` too.")
        tokenizer = load_tokenizer(model, revision=revision)
    elif isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if isinstance(model, str):
        model = load_model(CLIPModel, model, revision=revision, dtype=dtype)
    return CLIPEncoder(model, tokenizer, unescape=unescape, device=device, dtype=dtype)


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    """(n, width) of any precision, as float32 of length 1."""
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)
