# SPDX-License-Identifier: Apache-2.0
"""Preference pairs for the demo: sampled from the base model itself, or made from photographs it could not have drawn.

Both kinds are labelled by the primary verifier, never by hand, and both are `datasets.Dataset`s with the columns
`prompt`, `chosen`, `rejected` (PNG images), `source`, `class_id` and `colour_id`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import datasets
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from trl_sipo.demo.fashion import CLASSES, COLOURS, FashionPrompt, colour_values, load_split, tint, turn
from trl_sipo.demo.sampling import prompt_ids, sample_images
from trl_sipo.demo.verifier import Verifier
from trl_sipo.errors import ConfigurationError

FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "chosen": datasets.Image(),
        "rejected": datasets.Image(),
        "source": datasets.Value("string"),
        "class_id": datasets.Value("int64"),
        "colour_id": datasets.Value("int64"),
    }
)


def to_png(image: torch.Tensor) -> dict[str, bytes | None]:
    """Pixels (3, H, W) in [-1, 1] -> the form in which `datasets.Image` stores a PNG."""
    levels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def as_dataset(
    prompts: Sequence[FashionPrompt], chosen: torch.Tensor, rejected: torch.Tensor, source: str
) -> datasets.Dataset:
    """Pair i is prompt i with images i of `chosen` and `rejected`, both (N, 3, 32, 32) in [-1, 1]."""
    columns = {
        "prompt": [prompt.text for prompt in prompts],
        "chosen": [to_png(image) for image in chosen],
        "rejected": [to_png(image) for image in rejected],
        "source": [source] * len(prompts),
        "class_id": [prompt.class_id for prompt in prompts],
        "colour_id": [prompt.colour_id for prompt in prompts],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def on_policy_pairs(
    pipeline: StableDiffusionPipeline,
    verifier: Verifier,
    prompts: Sequence[FashionPrompt],
    *,
    groups_per_prompt: int,
    samples_per_group: int = 4,
    seed: int,
    min_gap: float = 0.05,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
) -> datasets.Dataset:
    """Sample a few images per prompt and pair the best with the worst, by the verifier's log-probability.

    Args:
        groups_per_prompt: pairs attempted for each prompt.
        samples_per_group: images that a pair is picked from, at least 2.
        min_gap: pairs whose log-probabilities differ by less, in nats, are ties and dropped.

    Raises:
        ConfigurationError: fewer than two samples in a group.
    """
    if samples_per_group < 2:
        raise ConfigurationError(f"samples_per_group={samples_per_group}: a pair needs at least 2 samples.")
    groups = [prompt for prompt in prompts for _ in range(groups_per_prompt)]
    asked = [prompt for prompt in groups for _ in range(samples_per_group)]
    texts = [prompt.text for prompt in asked]
    images = sample_images(pipeline, texts, seed, num_inference_steps, guidance_scale)
    scores = verifier.scores(images, *prompt_ids(asked))["log_prob"].view(len(groups), samples_per_group)
    images = images.view(len(groups), samples_per_group, *images.shape[1:])
    best, worst = scores.argmax(1), scores.argmin(1)
    rows = torch.arange(len(groups))
    kept = rows[(scores[rows, best] - scores[rows, worst]) >= min_gap]
    kept_prompts = [groups[i] for i in kept.tolist()]
    return as_dataset(kept_prompts, images[kept, best[kept]], images[kept, worst[kept]], "on_policy")


def tinted_photographs(class_ids: torch.Tensor, colour_ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random upright photographs of the generator's split, (N, 3, 32, 32) in [-1, 1].

    Args:
        class_ids: int64 (N,).
        colour_ids: int64 (N,).
    """
    split = load_split("generator")
    by_class = [(split.class_ids == class_id).nonzero()[:, 0] for class_id in range(len(CLASSES))]
    draws = torch.rand(len(class_ids), generator=generator)
    indices = [by_class[c][int(u * len(by_class[c]))] for c, u in zip(class_ids.tolist(), draws, strict=True)]
    return tint(split.images[torch.stack(indices)], colour_values(colour_ids, generator))


def off_policy_pairs(
    verifier: Verifier, prompts: Sequence[FashionPrompt], *, pairs_per_prompt: int, seed: int
) -> datasets.Dataset:
    """Pairs of real photographs, turned and mirrored as the base model never draws them.

    The chosen photograph shows what the prompt says. The rejected one has the wrong class or the wrong colour, each
    half of the time. A pair is kept where the verifier agrees: chosen right in class and colour, rejected not.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = [prompt for prompt in prompts for _ in range(pairs_per_prompt)]
    class_ids, colour_ids = prompt_ids(asked)
    wrong_class = torch.rand(len(asked), generator=generator) < 0.5
    other_class = (class_ids + torch.randint(1, len(CLASSES), class_ids.shape, generator=generator)) % len(CLASSES)
    other_colour = (colour_ids + torch.randint(1, len(COLOURS), class_ids.shape, generator=generator)) % len(COLOURS)

    def photograph(classes: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        return turn(tinted_photographs(classes, colours, generator), generator)

    chosen = photograph(class_ids, colour_ids)
    rejected = photograph(
        torch.where(wrong_class, other_class, class_ids), torch.where(wrong_class, colour_ids, other_colour)
    )
    right = [verifier.scores(images, class_ids, colour_ids)["both_correct"] for images in (chosen, rejected)]
    kept = (right[0] & ~right[1]).nonzero()[:, 0]
    return as_dataset([asked[i] for i in kept.tolist()], chosen[kept], rejected[kept], "off_policy")
