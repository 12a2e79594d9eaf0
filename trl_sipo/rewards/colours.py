# SPDX-License-Identifier: Apache-2.0
"""Which of ten colours a thing has: by CLIP, as GenEval asks it, or by hue, saturation and brightness alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from trl_sipo.rewards.pixels import cropped_pixels
from trl_sipo.rewards.requirements import COLOURS
from trl_sipo.rewards.weights import load_model, load_tokenizer

#: GenEval's texts, of which the embeddings are averaged for each colour.
COLOUR_TEXTS: Final = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
GREY: Final = -1
"""Stands for no colour in `pixel_colours`."""


class ColourClassifier(Protocol):
    """Names the colour of what pictures show."""

    def classify(self, pictures: Sequence[Image.Image], name: str) -> list[str | None]:
        """One of `COLOURS` for each picture, or None where none fits.

        Args:
            pictures: RGB, each cut out around one object.
            name: Of that object, in the singular.
        """
        ...


class ClipColours:
    """CLIP's choice among ten texts (zero-shot, as in GenEval), the nearest by cosine. It always names a colour.

    GenEval lays grey around the object, which its detector outlines; a box has no outline, so the whole cut is seen.

    Args:
        model: In eval mode, on the device that it shall run on.
        tokenizer: Its own.
        batch_size: Pictures at a time.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, *, batch_size: int = 32) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._embeddings = lru_cache(maxsize=None)(self.colour_embeddings)

    @classmethod
    def from_pretrained(cls, model: str, *, device: str = "cpu", revision: str | None = None) -> Self:
        """Load a hub id or a folder.

        Raises:
            ConfigurationError: It is not there, or does not load.
        """
        network = load_model(CLIPModel, model, revision=revision, dtype="float32")
        return cls(network.to(device), load_tokenizer(model, revision=revision))

    @torch.inference_mode()
    def classify(self, pictures: Sequence[Image.Image], name: str) -> list[str | None]:
        """See `ColourClassifier.classify`."""
        texts = self._embeddings(name)
        side = self.model.config.vision_config.image_size
        colours: list[str | None] = []
        for start in range(0, len(pictures), self.batch_size):
            pixels = cropped_pixels(pictures[start : start + self.batch_size], side).to(self.model.device)
            images = self.model.get_image_features(pixel_values=pixels).pooler_output
            colours += [COLOURS[index] for index in (images @ texts.T).argmax(1).tolist()]
        return colours

    @torch.inference_mode()
    def colour_embeddings(self, name: str) -> Tensor:
        """Mean direction of each colour's texts, float32 (10, width), of length 1."""
        texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEXTS]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        embeddings = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=1)
        return F.normalize(embeddings.unflatten(0, (len(COLOURS), -1)).mean(1), dim=1)


class HsvColours:
    """The commonest colour by `pixel_colours` in the middle half, by width and by height, of a picture. No weights.

    It sees the object's ground where the object leaves some of the middle free, and names none where grey prevails.
    """

    def classify(self, pictures: Sequence[Image.Image], name: str) -> list[str | None]:
        """See `ColourClassifier.classify`."""
        return [_commonest(pixel_colours(_middle(picture))) for picture in pictures]


def pixel_colours(image: Image.Image) -> np.ndarray:
    """The colour of every pixel, by fixed limits of hue, saturation and brightness.

    Args:
        image: RGB.

    Returns:
        int64 (height, width), indices of `COLOURS`, or `GREY`.
    """
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("HSV")) / 255, -1, 0)
    hue = 360 * hue
    is_warm = (hue < 50) | (hue >= 345)
    is_red = (hue < 15) | (hue >= 345)
    tests = {
        "black": value < 0.2,
        "white": (saturation < 0.12) & (value > 0.8),
        "grey": saturation < 0.12,
        "brown": is_warm & (value < 0.7) & (saturation < 0.9) & ~(is_red & (saturation > 0.8)),
        "pink": (hue >= 310) & (hue < 345) | is_red & (saturation < 0.55),
        "red": is_red,
        "orange": hue < 42,
        "yellow": hue < 70,
        "green": hue < 170,
        "blue": hue < 260,
    }
    names = {"grey": GREY} | {colour: index for index, colour in enumerate(COLOURS)}
    return np.select(list(tests.values()), [names[colour] for colour in tests], names["purple"])


def _middle(picture: Image.Image) -> Image.Image:
    left, top = picture.width // 4, picture.height // 4
    return picture.crop((left, top, picture.width - left, picture.height - top))


def _commonest(colours: np.ndarray) -> str | None:
    index = int(np.bincount(colours.ravel() - GREY).argmax()) + GREY
    return None if index == GREY else COLOURS[index]
