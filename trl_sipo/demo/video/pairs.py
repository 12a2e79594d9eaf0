# SPDX-License-Identifier: Apache-2.0
"""Preference pairs of clips, labelled by the primary verifier: sampled from the base model, or made of real ones.

Both kinds are `datasets.Dataset`s with the columns `prompt`, `chosen_latents`, `rejected_latents` (normalised latents
of the base's autoencoder) and `source`: no pair needs to be written and read as a video file.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import torch

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.demo.verifier import Verifier
from trl_sipo.demo.video.coding import encode_many, sample_clips
from trl_sipo.demo.video.model import LATENT_SHAPE
from trl_sipo.demo.video.sprites import (
    DIRECTIONS,
    MOVING_CLASSES,
    MOVING_COLOURS,
    VideoPrompt,
    make_clips,
    moving_photographs,
    prompt_ids,
)
from trl_sipo.demo.video.verifier import judge_clips

FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "chosen_latents": datasets.Array4D(LATENT_SHAPE, "float32"),
        "rejected_latents": datasets.Array4D(LATENT_SHAPE, "float32"),
        "source": datasets.Value("string"),
    }
)


def as_dataset(
    adapter: BackboneAdapter,
    prompts: Sequence[VideoPrompt],
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    source: str,
) -> datasets.Dataset:
    """Pair i is prompt i with clips i of `chosen` and `rejected`, both (N, 3, 5, 32, 32) in [-1, 1]."""
    columns = {
        "prompt": [prompt.text for prompt in prompts],
        "chosen_latents": encode_many(adapter, chosen).numpy(),
        "rejected_latents": encode_many(adapter, rejected).numpy(),
        "source": [source] * len(prompts),
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def on_policy_pairs(
    adapter: BackboneAdapter,
    verifier: Verifier,
    prompts: Sequence[VideoPrompt],
    *,
    groups_per_prompt: int,
    samples_per_group: int = 4,
    seed: int,
    min_gap: float = 0.05,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
) -> datasets.Dataset:
    """Sample a few clips per prompt and pair the best with the worst, by the verifier's log-probability.

    Args:
        groups_per_prompt: pairs attempted for each prompt.
        samples_per_group: clips that a pair is picked from.
        min_gap: pairs whose log-probabilities differ by less, in nats, are ties and dropped.
    """
    groups = [prompt for prompt in prompts for _ in range(groups_per_prompt)]
    asked = [prompt for prompt in groups for _ in range(samples_per_group)]
    texts = [prompt.text for prompt in asked]
    clips = sample_clips(adapter.pipeline, texts, seed, num_inference_steps, guidance_scale)
    scores = judge_clips(verifier, clips, prompt_ids(asked))["log_prob"].view(len(groups), samples_per_group)
    clips = clips.view(len(groups), samples_per_group, *clips.shape[1:])
    best, worst = scores.argmax(1), scores.argmin(1)
    rows = torch.arange(len(groups))
    kept = rows[(scores[rows, best] - scores[rows, worst]) >= min_gap]
    kept_prompts = [groups[i] for i in kept.tolist()]
    return as_dataset(adapter, kept_prompts, clips[kept, best[kept]], clips[kept, worst[kept]], "on_policy")


def turned_clips(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Clips of random photographs of the generator split, turned and mirrored as the base never draws them.

    Args:
        ids: class, colour and direction ids, int64 (N, 3).

    Returns:
        (N, 3, 5, 32, 32) in [-1, 1].
    """
    split = moving_photographs("generator")
    by_class = {class_id: (split.class_ids == class_id).nonzero()[:, 0] for class_id in MOVING_CLASSES}
    draws = torch.rand(len(ids), generator=generator).tolist()
    indices = [by_class[c][int(u * len(by_class[c]))] for c, u in zip(ids[:, 0].tolist(), draws, strict=True)]
    return make_clips(split.images[torch.stack(indices)], ids[:, 1], ids[:, 2], generator, turned_share=1.0)


def spoil_one_attribute(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Ids (N, 3) with the class, the colour or the direction replaced by another one, a third of the rows each."""
    spoiled = ids.clone()
    attribute = torch.randint(3, (len(ids),), generator=generator)
    for column, values in enumerate((MOVING_CLASSES, MOVING_COLOURS, range(len(DIRECTIONS)))):
        values = torch.tensor(values)
        place = torch.searchsorted(values, ids[:, column].contiguous())
        other = values[(place + torch.randint(1, len(values), place.shape, generator=generator)) % len(values)]
        spoiled[:, column] = torch.where(attribute == column, other, ids[:, column])
    return spoiled


def off_policy_pairs(
    adapter: BackboneAdapter, verifier: Verifier, prompts: Sequence[VideoPrompt], *, pairs_per_prompt: int, seed: int
) -> datasets.Dataset:
    """Pairs of clips of real photographs, turned and mirrored as the base model never draws them.

    The chosen one shows what the prompt says, the rejected one is wrong in class, colour or direction.

    A pair is kept where the verifier agrees: chosen right in class, colour and direction, rejected not.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = [prompt for prompt in prompts for _ in range(pairs_per_prompt)]
    ids = prompt_ids(asked)
    chosen, rejected = turned_clips(ids, generator), turned_clips(spoil_one_attribute(ids, generator), generator)
    is_right, is_still_right = (judge_clips(verifier, clips, ids)["correct"] for clips in (chosen, rejected))
    kept = (is_right & ~is_still_right).nonzero()[:, 0]
    return as_dataset(adapter, [asked[i] for i in kept.tolist()], chosen[kept], rejected[kept], "off_policy")
