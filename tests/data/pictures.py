# SPDX-License-Identifier: Apache-2.0
"""Small pictures and pairs of them for the tests of the data layer."""

import io
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """RGB noise: no two places of it, and no two seeds, look alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def canonical(count: int, **columns: Any) -> Dataset:
    """Pairs with the prompts "prompt 0", ..., all different, and other columns."""
    return Dataset.from_dict(
        {
            "prompt": [f"prompt {index}" for index in range(count)],
            "chosen": [picture(2 * index) for index in range(count)],
            "rejected": [picture(2 * index + 1) for index in range(count)],
            **columns,
        }
    )


def pick_a_pic() -> Dataset:
    """Six rows: first preferred, second preferred, tie, not judged, first preferred, second preferred."""
    return Dataset.from_dict(
        {
            "jpg_0": [encoded(picture(10 + row), "JPEG", quality=95) for row in range(6)],
            "jpg_1": [encoded(picture(20 + row), "JPEG", quality=95) for row in range(6)],
            "label_0": [1.0, 0.0, 0.5, 1.0, 1.0, 0.0],
            "label_1": [0.0, 1.0, 0.5, 0.0, 0.0, 1.0],
            "caption": [f"caption {row}" for row in range(6)],
            "has_label": [True, True, True, False, True, True],
            "ranking_id": list(range(6)),
        }
    )
