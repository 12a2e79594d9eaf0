# SPDX-License-Identifier: Apache-2.0
"""Open-vocabulary detectors of transformers, behind one interface: images and names in, boxes with names out.

Both give every box that their model proposes, each with the one name that fits it best, so that no box counts for two
objects. Which of them are believed is for `trl_sipo.rewards.detection` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil, Owlv2ForObjectDetection

from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.pixels import normalise
from trl_sipo.rewards.requirements import with_article
from trl_sipo.rewards.weights import load_model, load_tokenizer


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: float32 (n, 4) on the CPU: left, top, right and bottom edge, in pixels of the image.
        labels: What each box shows, n names.
        scores: float32 (n,) on the CPU, in [0, 1].
    """

    boxes: Tensor
    labels: tuple[str, ...]
    scores: Tensor


class Detector(Protocol):
    """Finds named objects in images."""

    name: str
    licence: str
    model: torch.nn.Module
    tokenizer: Any

    @property
    def settings(self) -> dict[str, Any]:
        """Whatever else its boxes depend on, by name."""
        ...

    def detect(self, images: Sequence[Image.Image], labels: Sequence[str]) -> list[Detections]:
        """Look for objects of these names.

        Args:
            images: RGB, of any size.
            labels: Names in the singular, without an article.

        Returns:
            One for each image, in any order of boxes, however weak their scores.
        """
        ...


class Owlv2Detector:
    """OWLv2 (Minderer, Gritsenko, Houlsby, arXiv:2306.09683). A score is the sigmoid of a box's logit for a name.

    Names are asked for as "a photo of a dog".

    Args:
        model: In eval mode, on the device that it shall run on.
        tokenizer: Its own.
    """

    name = "owlv2"
    licence = "Apache-2.0"
    settings: ClassVar = {}

    def __init__(self, model: Owlv2ForObjectDetection, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, model: str, *, device: str = "cpu", revision: str | None = None) -> Self:
        """Load a hub id or a folder.

        Raises:
            ConfigurationError: It is not there, or does not load.
        """
        network = load_model(Owlv2ForObjectDetection, model, revision=revision, dtype="float32")
        return cls(network.to(device), load_tokenizer(model, revision=revision))

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], labels: Sequence[str]) -> list[Detections]:
        """See `Detector.detect`."""
        config, device = self.model.config, self.model.device
        queries = self.tokenizer(
            [f"a photo of {with_article(label)}" for label in labels],
            padding="max_length",
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        output = self.model(
            pixel_values=owlv2_pixels(images, config.vision_config.image_size).to(device),
            input_ids=queries["input_ids"].repeat(len(images), 1),
            attention_mask=queries["attention_mask"].repeat(len(images), 1),
        )
        # Boxes are in units of the square that the image was padded to.
        units = torch.tensor([[max(image.size)] * 2 for image in images])
        return _detections(output.logits.sigmoid(), output.pred_boxes, units, labels)


def owlv2_pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """What OWLv2 sees: black below or to the right until an image is square, then bilinear to its resolution.

    Args:
        images: RGB, n of them, of any size.
        side: Of the square, in pixels.

    Returns:
        (n, 3, side, side) float32.
    """
    squares = []
    for image in images:
        longer = max(image.size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        square = F.pad(pixels, (0, longer - image.width, 0, longer - image.height))
        # Filtered where it shrinks, as the published weights were trained.
        squares.append(F.interpolate(square[None], (side, side), mode="bilinear", antialias=True)[0])
    return normalise(torch.stack(squares))


class GroundingDinoDetector:
    """Grounding DINO (Liu et al., arXiv:2303.05499). A score is the mean over a name's tokens of the box's sigmoids.

    All names are asked for in one caption, "dog. wine glass.", as in the paper's evaluation on COCO.

    Args:
        model: In eval mode, on the device that it shall run on.
        tokenizer: Its own; one of those that know where in the text a token was.
        image_processor: Its own.
    """

    name = "grounding_dino"
    licence = "Apache-2.0"

    def __init__(
        self,
        model: GroundingDinoForObjectDetection,
        tokenizer: Any,
        image_processor: GroundingDinoImageProcessorPil,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @property
    def settings(self) -> dict[str, Any]:
        """How large images are made, and the like."""
        return {"image_processor": self.image_processor.to_json_string()}

    @classmethod
    def from_pretrained(cls, model: str, *, device: str = "cpu", revision: str | None = None) -> Self:
        """Load a hub id or a folder.

        Raises:
            ConfigurationError: It is not there, or does not load.
        """
        network = load_model(GroundingDinoForObjectDetection, model, revision=revision, dtype="float32")
        tokenizer = load_tokenizer(model, revision=revision)
        try:
            image_processor = GroundingDinoImageProcessorPil.from_pretrained(model, revision=revision)
        except OSError as error:
            raise ConfigurationError(
                f"preprocessor_config.json of {model!r} does not load: {error}. Save it beside the weights."
            ) from error
        return cls(network.to(device), tokenizer, image_processor)

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], labels: Sequence[str]) -> list[Detections]:
        """See `Detector.detect`.

        Raises:
            ConfigurationError: The names are too many for the model's caption.
        """
        caption, token_share = self._caption(labels)
        found: dict[int, Detections] = {}
        for indices in _by_size(images):
            pictures = [images[index] for index in indices]
            inputs = self.image_processor(images=pictures, return_tensors="pt").to(self.model.device)
            text = {key: value.expand(len(indices), -1) for key, value in caption.items()}
            output = self.model(**inputs, **text)
            # Logits of the tokens, and minus infinity up to the longest caption there can be.
            probabilities = output.logits.sigmoid()[..., : token_share.shape[1]] @ token_share.T
            units = torch.tensor([picture.size for picture in pictures])
            found |= zip(indices, _detections(probabilities, output.pred_boxes, units, labels), strict=True)
        return [found[index] for index in range(len(images))]

    def _caption(self, labels: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """The tokens of all names, each (1, T), and what share each token has in each name, (names, T)."""
        encoded = self.tokenizer(
            "".join(f"{label}. " for label in labels).rstrip(),
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_tensors="pt",
        ).to(self.model.device)
        offsets = encoded.pop("offset_mapping")[0]
        limit = self.model.config.max_text_len
        if len(offsets) > limit:
            raise ConfigurationError(
                f"{len(labels)} names are {len(offsets)} tokens, and this detector reads {limit}. Give fewer of them "
                "(`vocabulary`)."
            )
        share = torch.zeros(len(labels), len(offsets), device=offsets.device)
        start = 0
        for row, label in enumerate(labels):
            end = start + len(label)
            share[row] = (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
            start = end + len(". ")
        return dict(encoded), share / share.sum(1, keepdim=True)


def _by_size(images: Sequence[Image.Image]) -> list[list[int]]:
    """Indices of images, those of one size together: padding to a common size would move scores a little."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.size, []).append(index)
    return list(groups.values())


def _detections(probabilities: Tensor, boxes: Tensor, units: Tensor, labels: Sequence[str]) -> list[Detections]:
    """Each box with its best name.

    Args:
        probabilities: (N, boxes, names), in [0, 1].
        boxes: (N, boxes, 4), centre x and y, width, height, in `units`.
        units: (N, 2), across and down, in pixels.
        labels: The names.
    """
    scores, best = probabilities.float().cpu().max(dim=2)
    centres, extents = boxes.float().cpu().split(2, dim=2)
    corners = torch.cat([centres - extents / 2, centres + extents / 2], dim=2) * units.repeat(1, 2)[:, None]
    return [
        Detections(corners[row], tuple(labels[index] for index in best[row].tolist()), scores[row])
        for row in range(len(scores))
    ]
