# SPDX-License-Identifier: Apache-2.0
"""The demo's data: preference pairs from the base model and from elsewhere, and the measure of the base itself."""

import json
from collections.abc import Callable
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import datasets
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from trl_sipo.demo.arm import DemoFiles, draw, measure_images, measurement_prompts, to_bytes
from trl_sipo.demo.fashion import COLOURS, FashionPrompt, colour_values, load_split, split_prompts, tint
from trl_sipo.demo.latents import decode, encode
from trl_sipo.demo.pairs import off_policy_pairs, on_policy_pairs
from trl_sipo.demo.settings import DemoSettings
from trl_sipo.demo.verifier import Verifier

HELD_OUT_SEED_OFFSET = 1000


def settings_digest(settings: DemoSettings) -> str:
    """A short hash of the protocol; results of another protocol are not mixed with it."""
    return blake2b(json.dumps(asdict(settings), sort_keys=True).encode(), digest_size=6).hexdigest()


def make_pairs(
    pipeline: StableDiffusionPipeline, verifier: Verifier, settings: DemoSettings, *, held_out: bool
) -> datasets.Dataset:
    """Training pairs, or held-out ones over prompts that training does not see; both sources, shuffled."""
    train_prompts, held_out_prompts = split_prompts()
    prompts = held_out_prompts if held_out else train_prompts
    on_policy, off_policy = settings.num_on_policy, settings.num_off_policy
    if held_out:
        on_policy, off_policy = (settings.num_held_out if count else 0 for count in (on_policy, off_policy))
    seed = settings.data_seed + (HELD_OUT_SEED_OFFSET if held_out else 0)
    parts = []
    if on_policy:
        sampled = on_policy_pairs(
            pipeline,
            verifier,
            prompts,
            groups_per_prompt=_per_prompt(on_policy, prompts),
            seed=seed,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
        parts.append(sampled.shuffle(seed=seed).select(range(min(on_policy, len(sampled)))))
    if off_policy:
        foreign = off_policy_pairs(verifier, prompts, pairs_per_prompt=_per_prompt(off_policy, prompts), seed=seed)
        parts.append(foreign.shuffle(seed=seed).select(range(min(off_policy, len(foreign)))))
    return datasets.concatenate_datasets(parts).shuffle(seed=seed)


def _per_prompt(count: int, prompts: list[FashionPrompt]) -> int:
    # A fifth more than needed, since near ties are dropped.
    return -(-count * 6 // (5 * len(prompts)))


def reference_features(pipeline: StableDiffusionPipeline, second: Verifier, seed: int = 0) -> torch.Tensor:
    """Features of the real test photographs in random colours, after the autoencoder: those of perfect samples."""
    generator = torch.Generator().manual_seed(seed)
    split = load_split("test")
    colour_ids = torch.randint(len(COLOURS), (len(split),), generator=generator)
    real = tint(split.images, colour_values(colour_ids, generator))
    return second.features(decode(pipeline.vae, encode(pipeline.vae, real)[0]))


def prepare(
    pipeline: StableDiffusionPipeline,
    verifiers: tuple[Verifier, Verifier],
    settings: DemoSettings,
    files: DemoFiles,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the pairs and the reference features, measure the base; returns the base's record."""
    files.train_pairs.parent.mkdir(parents=True, exist_ok=True)
    say("Sampling preference pairs from the base model and ranking them by the verifier")
    train = make_pairs(pipeline, verifiers[0], settings, held_out=False)
    held_out = make_pairs(pipeline, verifiers[0], settings, held_out=True)
    train.to_parquet(files.train_pairs)
    held_out.to_parquet(files.held_out_pairs)
    reference = reference_features(pipeline, verifiers[1])
    save_file({"features": reference.contiguous()}, files.reference_features)
    say("Measuring the base model")
    prompts = measurement_prompts(settings)
    images = draw(pipeline, prompts, settings)
    save_file({"images": to_bytes(images)}, files.root / "data" / "base_images.safetensors")
    return {
        "num_train_pairs": len(train),
        "num_held_out_pairs": len(held_out),
        "sources": {name: train["source"].count(name) for name in sorted(set(train["source"]))},
        **measure_images(images, prompts, verifiers, reference),
    }
