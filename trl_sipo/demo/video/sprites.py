# SPDX-License-Identifier: Apache-2.0
"""Small real clips with a text description: a tinted photograph that moves ("a red sneaker moving left")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trl_sipo.demo.fashion import IMAGE_SIZE, FashionPrompt, FashionSplit, colour_values, load_split, tint, turn

NUM_FRAMES = 5
#: Ids of the classes and colours that move: a few that stay apart at this size, so that minutes of training suffice.
MOVING_CLASSES = (0, 1, 5, 6)
MOVING_COLOURS = (0, 2, 3, 4)
#: Directions, as they stand in a prompt; the index is the direction id.
DIRECTIONS = ("left", "right", "up", "down")
#: Unit step of each direction, (x, y) with y downwards.
DIRECTION_STEPS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))
#: Size of a sprite in units of the photograph.
SPRITE_SCALE = 0.7
#: Pixels per frame, from the slowest to the fastest clip.
SPEEDS = (1.6, 2.6)
#: How far from the centre of the picture, in pixels, the centre of a sprite may be.
MAX_OFFSET = 6.0


@dataclass(frozen=True)
class VideoPrompt:
    """One combination of class, colour and direction, with the sentence that describes it."""

    garment: FashionPrompt
    direction_id: int

    @property
    def text(self) -> str:
        """The prompt, such as "a red sneaker moving left"."""
        return f"{self.garment.text} moving {DIRECTIONS[self.direction_id]}"

    @property
    def ids(self) -> tuple[int, int, int]:
        """Class id, colour id and direction id."""
        return self.garment.class_id, self.garment.colour_id, self.direction_id


def all_video_prompts() -> list[VideoPrompt]:
    """All 64 combinations: class by class, in a class colour by colour, in a colour the four directions."""
    return [
        VideoPrompt(FashionPrompt(class_id, colour_id), direction_id)
        for class_id in MOVING_CLASSES
        for colour_id in MOVING_COLOURS
        for direction_id in range(len(DIRECTIONS))
    ]


def place(pixels: torch.Tensor, centres: torch.Tensor, scale: float) -> torch.Tensor:
    """Shrink pictures on a white ground and move their centres; parts that leave the picture are cut off.

    Args:
        pixels: (N, 3, 32, 32) in [-1, 1].
        centres: (N, 2), where the picture's centre goes, (x, y) in pixels from the centre of the canvas.
        scale: Size on the canvas in units of the original one; above 1 it is a close-up.

    Returns:
        (N, 3, 32, 32) in [-1, 1].
    """
    # A point of the canvas, in units of half its side, is looked up at (point - centre) / scale in the picture.
    shift = -centres / (scale * IMAGE_SIZE / 2)
    affine = torch.cat([torch.eye(2).expand(len(pixels), 2, 2) / scale, shift[:, :, None]], dim=2)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    # Outside the picture sampling gives 0: move white there, and back.
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def paths(direction_ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Straight ways across the picture at a random speed and place.

    Args:
        direction_ids: int64 (N,).

    Returns:
        Centres of the sprite, float32 (N, 5, 2), (x, y) in pixels from the centre of the picture.
    """
    num_clips = len(direction_ids)
    along = torch.tensor(DIRECTION_STEPS)[direction_ids][:, None]
    across = along.flip(2)
    slowest, fastest = SPEEDS
    speed = slowest + (fastest - slowest) * torch.rand(num_clips, 1, 1, generator=generator)
    times = torch.arange(NUM_FRAMES)[None, :, None] - (NUM_FRAMES - 1) / 2
    middle = (MAX_OFFSET - speed * (NUM_FRAMES - 1) / 2) * (2 * torch.rand(num_clips, 1, 1, generator=generator) - 1)
    beside = MAX_OFFSET * (2 * torch.rand(num_clips, 1, 1, generator=generator) - 1)
    return along * (speed * times + middle) + across * beside


def make_clips(
    photographs: torch.Tensor,
    colour_ids: torch.Tensor,
    direction_ids: torch.Tensor,
    generator: torch.Generator,
    *,
    turned_share: float = 0.0,
) -> torch.Tensor:
    """Tint photographs, shrink them and let them move.

    Args:
        photographs: uint8 (N, 28, 28), 0 = background.
        colour_ids: int64 (N,).
        direction_ids: int64 (N,).
        turned_share: Chance of a photograph to be turned, mirrored and shrunk, see `fashion.turn`.

    Returns:
        float32 (N, 3, 5, 32, 32) in [-1, 1] on a white ground.
    """
    pictures = tint(photographs, colour_values(colour_ids, generator))
    if turned_share > 0:
        is_turned = torch.rand(len(pictures), 1, 1, 1, generator=generator) < turned_share
        pictures = torch.where(is_turned, turn(pictures, generator), pictures)
    frames = pictures.repeat_interleave(NUM_FRAMES, dim=0)
    moved = place(frames, paths(direction_ids, generator).flatten(0, 1), SPRITE_SCALE)
    return moved.unflatten(0, (-1, NUM_FRAMES)).transpose(1, 2)


def moving_photographs(split: str) -> FashionSplit:
    """The photographs of one split that show one of `MOVING_CLASSES`."""
    photographs = load_split(split)
    moving = torch.isin(photographs.class_ids, torch.tensor(MOVING_CLASSES))
    return FashionSplit(photographs.images[moving], photographs.class_ids[moving])


def random_clips(
    split: FashionSplit, count: int, generator: torch.Generator, *, turned_share: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of random photographs of a split, in random colours and directions.

    Returns:
        Clips (count, 3, 5, 32, 32) and their class, colour and direction ids, int64 (count, 3).
    """
    chosen = torch.randint(len(split), (count,), generator=generator)
    colour_ids = torch.tensor(MOVING_COLOURS)[torch.randint(len(MOVING_COLOURS), (count,), generator=generator)]
    direction_ids = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    clips = make_clips(split.images[chosen], colour_ids, direction_ids, generator, turned_share=turned_share)
    return clips, torch.stack([split.class_ids[chosen], colour_ids, direction_ids], dim=1)


def split_video_prompts() -> tuple[list[VideoPrompt], list[VideoPrompt]]:
    """The 48 prompts of preference training and the 16 held out from it.

    The held-out ones are a Latin square: every class with every colour once, every direction four times.
    """
    size = len(DIRECTIONS)
    held_out = [prompt for row, prompt in enumerate(all_video_prompts()) if _is_held_out(row, size)]
    train = [prompt for prompt in all_video_prompts() if prompt not in held_out]
    return train, held_out


def _is_held_out(row: int, size: int) -> bool:
    """Whether class, colour and direction, the digits of `row` to the base of `size`, are on the square's diagonal."""
    return (row // size**2 + row // size + row) % size == 0


def prompt_ids(prompts: Sequence[VideoPrompt]) -> torch.Tensor:
    """Class, colour and direction ids, int64 (N, 3)."""
    return torch.tensor([prompt.ids for prompt in prompts])
