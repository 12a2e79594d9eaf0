# SPDX-License-Identifier: Apache-2.0
"""Tinted Fashion-MNIST: small real photographs with a text description ("a red sneaker").

Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv:1708.07747; MIT licence, see `assets/fashion/NOTICE`) holds grey product
photographs of 28x28 pixels. Eight of its ten classes are kept (shirts and coats are dropped: at this size people
confuse them with t-shirts and pullovers), and each photograph is coloured and set on white, at 32x32 pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from trl_sipo.errors import ConfigurationError

ASSETS = Path(__file__).parent / "assets"
IMAGE_SIZE = 32
RAW_SIZE = 28
STRIP_COLUMNS = 25

#: Class names, as they stand in a prompt; the index is the class id.
CLASSES = ("t-shirt", "trousers", "pullover", "dress", "sandal", "sneaker", "bag", "ankle boot")
#: Label of each class in the original dataset.
ORIGINAL_LABELS = (0, 1, 2, 3, 5, 7, 8, 9)
#: Colour names, as they stand in a prompt; the index is the colour id.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
#: One sRGB triple per colour, 0 to 255.
COLOUR_RGB = (
    (214, 32, 40),
    (245, 130, 20),
    (240, 205, 30),
    (34, 150, 70),
    (35, 80, 210),
    (125, 50, 175),
    (250, 120, 185),
    (35, 35, 38),
)
#: Images per class in each split. No photograph is in two splits; `test` comes from the dataset's own test set.
SPLITS = {"generator": 500, "verifier": 500, "second_verifier": 300, "test": 125}


@dataclass(frozen=True)
class FashionSplit:
    """Grey photographs of one split: `images` uint8 (N, 28, 28), 0 = background; `class_ids` int64 (N,)."""

    images: torch.Tensor
    class_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True)
class FashionPrompt:
    """One combination of class and colour, with the sentence that describes it."""

    class_id: int
    colour_id: int

    @property
    def text(self) -> str:
        """The prompt, with the article that the colour asks for and none before "trousers"."""
        colour, name = COLOURS[self.colour_id], CLASSES[self.class_id]
        if name == "trousers":
            return f"{colour} {name}"
        article = "an" if colour[0] in "aeiou" else "a"
        return f"{article} {colour} {name}"


def strip_path(split: str, class_id: int, root: Path | None = None) -> Path:
    """The PNG file with the photographs of one class of one split."""
    folder = root if root is not None else ASSETS / "fashion"
    return folder / f"{split}_{class_id}_{CLASSES[class_id].replace(' ', '_')}.png"


def write_strip(images: np.ndarray, path: Path) -> None:
    """Write uint8 (N, 28, 28) as one grey PNG, 25 photographs a row; N must be a multiple of 25."""
    rows = images.reshape(-1, STRIP_COLUMNS, RAW_SIZE, RAW_SIZE)
    sheet = rows.transpose(0, 2, 1, 3).reshape(-1, STRIP_COLUMNS * RAW_SIZE)
    Image.fromarray(sheet).save(path, optimize=True)


def read_strip(path: Path) -> np.ndarray:
    """The inverse of `write_strip`: uint8 (N, 28, 28)."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    rows = pixels.reshape(-1, RAW_SIZE, STRIP_COLUMNS, RAW_SIZE)
    return rows.transpose(0, 2, 1, 3).reshape(-1, RAW_SIZE, RAW_SIZE)


@cache
def load_split(split: str) -> FashionSplit:
    """Load one of the shipped splits (`SPLITS`).

    Raises:
        ConfigurationError: `split` is not a key of `SPLITS`.
    """
    if split not in SPLITS:
        raise ConfigurationError(f"split={split!r} does not exist; the shipped splits are {', '.join(SPLITS)}.")
    images = [read_strip(strip_path(split, class_id)) for class_id in range(len(CLASSES))]
    class_ids = np.concatenate([np.full(len(part), class_id) for class_id, part in enumerate(images)])
    return FashionSplit(torch.from_numpy(np.concatenate(images)), torch.from_numpy(class_ids).long())


def colour_values(colour_ids: torch.Tensor, generator: torch.Generator | None, jitter: float = 0.06) -> torch.Tensor:
    """sRGB of each colour id (N,) -> float32 (N, 3) in [0, 1].

    With a generator each channel moves by a uniform draw of at most `jitter`, so that no two "red" are quite the same.
    """
    rgb = torch.tensor(COLOUR_RGB, dtype=torch.float32)[colour_ids] / 255
    if generator is None:
        return rgb
    shift = (2 * torch.rand(rgb.shape, generator=generator) - 1) * jitter
    return (rgb + shift).clamp(0, 1)


def tint(images: torch.Tensor, rgb: torch.Tensor) -> torch.Tensor:
    """Colour grey photographs and set them on white.

    The photograph's grey value gives both the outline (dark pixels are background) and the shading.

    Args:
        images: uint8 (N, 28, 28), 0 = background.
        rgb: float (N, 3) in [0, 1].

    Returns:
        float32 (N, 3, 32, 32) in [-1, 1].
    """
    margin = (IMAGE_SIZE - RAW_SIZE) // 2
    grey = F.pad(images.float() / 255, (margin,) * 4)[:, None]
    opacity = (3 * grey).clamp(max=1)
    shading = 0.55 + 0.45 * grey
    coloured = rgb[:, :, None, None] * shading
    return 2 * (1 - opacity + opacity * coloured) - 1


def turn(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Photographs as nobody took them: each mirrored or not, turned by up to 25 degrees, and shrunk to 0.65-0.95.

    Args:
        pixels: float (N, 3, 32, 32) in [-1, 1] on a white ground.

    Returns:
        float (N, 3, 32, 32) in [-1, 1] on a white ground.
    """
    num_images = len(pixels)
    angle = math.radians(25) * (2 * torch.rand(num_images, generator=generator) - 1)
    inverse_scale = 1 / (0.65 + 0.3 * torch.rand(num_images, generator=generator))
    mirror = 2.0 * torch.randint(2, (num_images,), generator=generator) - 1
    cos, sin, zero = angle.cos() * inverse_scale, angle.sin() * inverse_scale, torch.zeros(num_images)
    affine = torch.stack([torch.stack([mirror * cos, -mirror * sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    # Outside the picture sampling gives 0: move white there, and back.
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def all_prompts() -> list[FashionPrompt]:
    """All 64 combinations, class by class."""
    return [FashionPrompt(class_id, colour) for class_id in range(len(CLASSES)) for colour in range(len(COLOURS))]


def split_prompts() -> tuple[list[FashionPrompt], list[FashionPrompt]]:
    """The 48 prompts of preference training and the 16 held out from it.

    The held-out ones take two colours from each class and two classes from each colour. The base model has seen all
    64; the split measures whether preference training carries over to combinations that its pairs do not hold.
    """
    held_out = [p for p in all_prompts() if (p.colour_id - p.class_id) % len(COLOURS) in (2, 5)]
    train = [p for p in all_prompts() if p not in held_out]
    return train, held_out
