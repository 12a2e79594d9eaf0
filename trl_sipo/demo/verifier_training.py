# SPDX-License-Identifier: Apache-2.0
"""How the judges of `verifier` are trained, and how good they are on photographs nobody was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from tqdm.auto import tqdm

from trl_sipo.demo.fashion import COLOURS, FashionSplit, colour_values, load_split, tint, turn
from trl_sipo.demo.latents import decode, encode
from trl_sipo.demo.verifier import NONE_CLASS, TRAINING_SPLITS, Verifier

#: Classes by outline (tops and dresses, trousers, shoes, bags): only a double exposure across groups is "none".
OUTLINE_GROUPS = (0, 1, 0, 0, 2, 2, 3, 2)
TINTS_PER_PHOTOGRAPH = 3
BATCH_SIZE = 128
MAX_SHIFT = 2
TURNED_SHARE = 0.35


def spoil(latents: torch.Tensor, class_ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents of unit variance that show no garment: a quarter each of double exposures of unlike garments, latents
    with their four quarters shuffled, latents under noise, and smooth noise alone."""
    groups = torch.tensor(OUTLINE_GROUPS)[class_ids]
    order = torch.randperm(len(latents), generator=generator)
    parts = []
    for kind, chosen in enumerate(order.chunk(4)):
        original = latents[chosen]
        noise = torch.randn(original.shape, generator=generator)
        if kind == 0:
            partner = torch.randint(len(latents), (len(chosen),), generator=generator)
            unlike = groups[chosen] != groups[partner]
            parts.append((0.5 * (original + latents[partner]))[unlike])
        elif kind == 1:
            quarters = [original[:, :, i : i + 4, j : j + 4] for i, j in ((4, 4), (0, 4), (4, 0), (0, 0))]
            parts.append(torch.cat([torch.cat(quarters[:2], 3), torch.cat(quarters[2:], 3)], 2))
        elif kind == 2:
            strength = 0.9 + 0.6 * torch.rand(len(chosen), 1, 1, 1, generator=generator)
            parts.append(0.5 * original + strength * noise)
        else:
            coarse = torch.randn(len(chosen), 4, 3, 3, generator=generator)
            parts.append(F.interpolate(coarse, size=8, mode="bicubic") * 1.3 + 0.3 * noise)
    return torch.cat(parts)


class TrainingPictures:
    """What a judge learns from: tinted photographs, some turned, their reconstructions, and spoiled pictures."""

    def __init__(self, split: FashionSplit, vae: AutoencoderKL, generator: torch.Generator, device: str) -> None:
        num_copies = len(split) * TINTS_PER_PHOTOGRAPH
        self.class_ids = split.class_ids.repeat(TINTS_PER_PHOTOGRAPH)
        self.colour_ids = torch.randint(len(COLOURS), (num_copies,), generator=generator)
        photographs = split.images.repeat(TINTS_PER_PHOTOGRAPH, 1, 1)
        upright = tint(photographs, colour_values(self.colour_ids, generator))
        # A model trained on the turned photographs of the off-policy pairs must not be marked down for turning.
        turned = torch.rand(num_copies, 1, 1, 1, generator=generator) < TURNED_SHARE
        self.real = torch.where(turned, turn(upright, generator), upright)
        latents, _ = encode(vae, self.real, device)
        # Sampled latents are never as clean as encoded ones.
        strength = 0.3 * torch.rand(num_copies, 1, 1, 1, generator=generator)
        rough = latents + strength * torch.randn(latents.shape, generator=generator)
        self.decoded = decode(vae, rough, device)
        self.spoiled = decode(vae, spoil(latents[: len(split)], split.class_ids, generator), device)

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`size` pictures, half of them real and half decoded, then `size // 8` spoiled ones: images, class ids with
        the spoiled as "none", colour ids of the first `size`."""
        chosen = torch.randint(len(self.class_ids), (size,), generator=generator)
        spoiled = torch.randint(len(self.spoiled), (size // 8,), generator=generator)
        half = size // 2
        images = torch.cat([self.real[chosen[:half]], self.decoded[chosen[half:]], self.spoiled[spoiled]])
        none = torch.full((len(spoiled),), NONE_CLASS)
        return disturb(images, generator), torch.cat([self.class_ids[chosen], none]), self.colour_ids[chosen]


def disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift a batch by up to two pixels (white comes in) and add faint noise."""
    padded = F.pad(images, (MAX_SHIFT,) * 4, value=1.0)
    down, right = torch.randint(2 * MAX_SHIFT + 1, (2,), generator=generator).tolist()
    size = images.shape[-1]
    shifted = padded[:, :, down : down + size, right : right + size]
    return shifted + 0.04 * torch.randn(shifted.shape, generator=generator)


def train_verifier(
    name: str, vae: AutoencoderKL, *, num_steps: int, seed: int, device: str
) -> tuple[Verifier, list[dict[str, float]]]:
    """Train one judge on its own split of photographs; returns it, ready for inference, and its loss curve."""
    generator = torch.Generator().manual_seed(seed)
    pictures = TrainingPictures(load_split(TRAINING_SPLITS[name]), vae, generator, device)
    return fit_verifier(name, pictures.batch, generator, num_steps=num_steps, seed=seed, device=device)


def fit_verifier(
    name: str,
    draw_batch: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    generator: torch.Generator,
    *,
    num_steps: int,
    seed: int,
    device: str,
) -> tuple[Verifier, list[dict[str, float]]]:
    """Train a judge on what `draw_batch(size, generator)` gives (see `TrainingPictures.batch`); `seed` is that of its
    first weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        verifier = Verifier(name).to(device)
    optimizer = torch.optim.AdamW(verifier.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / num_steps)))
    log = []
    for step in tqdm(range(num_steps), desc=f"{name} verifier", unit="step"):
        images, class_ids, colour_ids = (part.to(device) for part in draw_batch(BATCH_SIZE, generator))
        class_logits, colour_logits = verifier(images)
        loss = F.cross_entropy(class_logits, class_ids, label_smoothing=0.02)
        loss = loss + F.cross_entropy(colour_logits[: len(colour_ids)], colour_ids, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(verifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            log.append({"step": step + 1, "loss": round(loss.item(), 4)})
    return verifier.cpu().eval().requires_grad_(False), log


def accuracies(
    verifier: Verifier, images: torch.Tensor, class_ids: torch.Tensor, colour_ids: torch.Tensor
) -> dict[str, float]:
    """Share of images judged right: `class`, `colour`, `both`, each in [0, 1], and the mean `log_prob`."""
    scores = verifier.scores(images, class_ids, colour_ids)
    named = {key: scores[f"{key}_correct"].float().mean().item() for key in ("class", "colour", "both")}
    return {key: round(value, 4) for key, value in {**named, "log_prob": scores["log_prob"].mean().item()}.items()}


def ceiling(verifier: Verifier, vae: AutoencoderKL, *, seed: int, device: str) -> dict[str, dict[str, float]]:
    """Accuracies on the 1,000 real test photographs, tinted, as they are and after the autoencoder.

    `reconstructed` is what a generator that draws exactly like the photographs would score. A higher score is not a
    better model: it comes from drawing only the most typical garments, and diversity falls with it.
    """
    generator = torch.Generator().manual_seed(seed)
    split = load_split("test")
    colour_ids = torch.randint(len(COLOURS), (len(split),), generator=generator)
    real = tint(split.images, colour_values(colour_ids, generator))
    reconstructed = decode(vae, encode(vae, real, device)[0], device)
    pictures = {"real": real, "reconstructed": reconstructed}
    return {kind: accuracies(verifier, images, split.class_ids, colour_ids) for kind, images in pictures.items()}
