# SPDX-License-Identifier: Apache-2.0
"""How the judges of clips are trained, and how good they are on clips of photographs nobody was trained on."""

from __future__ import annotations

import torch

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.demo.verifier import NONE_CLASS, TRAINING_SPLITS, Verifier
from trl_sipo.demo.verifier_training import TURNED_SHARE, disturb, fit_verifier
from trl_sipo.demo.video.coding import decode_many, encode_many
from trl_sipo.demo.video.sprites import moving_photographs, random_clips
from trl_sipo.demo.video.verifier import close_ups, judge_clips

#: Clips that a judge learns from.
NUM_CLIPS = 1000
#: Clips of test photographs that a judge is measured on.
NUM_TEST_CLIPS = 500


def spoil_latents(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normalised latents that show no garment: a third each of double exposures, latents with their rows and columns
    shuffled, and latents under noise."""
    order = torch.randperm(len(latents), generator=generator)
    exposed, shuffled, noised = (latents[part] for part in order.chunk(3))
    partners = latents[torch.randint(len(latents), (len(exposed),), generator=generator)]
    rows, columns = (torch.randperm(latents.shape[-1], generator=generator) for _ in range(2))
    noise = torch.randn(noised.shape, generator=generator)
    strength = 0.9 + 0.6 * torch.rand(len(noised), 1, 1, 1, 1, generator=generator)
    return torch.cat([(exposed + partners) / 2, shuffled[..., rows, :][..., columns], noised / 2 + strength * noise])


class CloseUps:
    """What a judge learns from: close-ups of real clips, of their reconstructions, and of spoiled ones."""

    def __init__(self, split: str, adapter: BackboneAdapter, generator: torch.Generator) -> None:
        # A model trained on the turned photographs of the off-policy pairs must not be marked down for turning.
        clips, ids = random_clips(moving_photographs(split), NUM_CLIPS, generator, turned_share=TURNED_SHARE)
        latents = encode_many(adapter, clips)
        # Sampled latents are never as clean as encoded ones.
        strength = 0.3 * torch.rand(NUM_CLIPS, 1, 1, 1, 1, generator=generator)
        rough = latents + strength * torch.randn(latents.shape, generator=generator)
        spoiled = spoil_latents(latents[: NUM_CLIPS // 2], generator)
        self.real = close_ups(clips)
        self.decoded = close_ups(decode_many(adapter, rough))
        self.spoiled = close_ups(decode_many(adapter, spoiled))
        self.class_ids, self.colour_ids, _ = ids.repeat_interleave(clips.shape[2], dim=0).unbind(1)

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`size` close-ups, half of them real and half decoded, then `size // 8` spoiled ones: images, class ids with
        the spoiled as "none", colour ids of the first `size`."""
        chosen = torch.randint(len(self.class_ids), (size,), generator=generator)
        spoiled = torch.randint(len(self.spoiled), (size // 8,), generator=generator)
        half = size // 2
        images = torch.cat([self.real[chosen[:half]], self.decoded[chosen[half:]], self.spoiled[spoiled]])
        none = torch.full((len(spoiled),), NONE_CLASS)
        return disturb(images, generator), torch.cat([self.class_ids[chosen], none]), self.colour_ids[chosen]


def train_clip_verifier(
    name: str, adapter: BackboneAdapter, *, num_steps: int, seed: int
) -> tuple[Verifier, list[dict[str, float]]]:
    """Train one judge on clips of its own split of photographs; returns it and its loss curve."""
    generator = torch.Generator().manual_seed(seed)
    pictures = CloseUps(TRAINING_SPLITS[name], adapter, generator)
    return fit_verifier(name, pictures.batch, generator, num_steps=num_steps, seed=seed, device="cpu")


def clip_accuracies(verifier: Verifier, clips: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Share of clips judged right: `class`, `colour`, `direction` and `all`, each in [0, 1]."""
    judged = judge_clips(verifier, clips, ids)
    names = {"class": "class_correct", "colour": "colour_correct", "direction": "direction_correct", "all": "correct"}
    return {name: round(judged[key].float().mean().item(), 4) for name, key in names.items()}


def clip_ceiling(verifier: Verifier, adapter: BackboneAdapter, *, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies on clips of real test photographs, as they are and after the autoencoder.

    `reconstructed` is what a generator that draws exactly like the real clips would score.
    """
    clips, ids = random_clips(moving_photographs("test"), NUM_TEST_CLIPS, torch.Generator().manual_seed(seed))
    pictures = {"real": clips, "reconstructed": decode_many(adapter, encode_many(adapter, clips))}
    return {kind: clip_accuracies(verifier, shown, ids) for kind, shown in pictures.items()}
