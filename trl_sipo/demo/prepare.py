# SPDX-License-Identifier: Apache-2.0
"""The demo's data: preference pairs from the base model and from elsewhere, and the measure of the base itself."""

import json
import os
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


def protocol_digest(settings: DemoSettings, files: DemoFiles) -> str:
    """A short hash of the protocol and the base model, whichever arms and seeds are run.

    Results of another one are not mixed with it.
    """
    protocol = {name: value for name, value in asdict(settings).items() if name != "parts"}
    digest = blake2b(json.dumps(protocol, sort_keys=True).encode(), digest_size=6)
    for weights in sorted(files.base.glob("*/**/*.safetensors")):
        digest.update(weights.read_bytes())
    return digest.hexdigest()


def make_pairs(
    pipeline: StableDiffusionPipeline, verifier: Verifier, settings: DemoSettings, source: str, *, held_out: bool
) -> datasets.Dataset:
    """Training pairs, or held-out ones over prompts that training does not see, shuffled."""
    train_prompts, held_out_prompts = split_prompts()
    prompts, count = (held_out_prompts, settings.num_held_out) if held_out else (train_prompts, settings.num_pairs)
    seed = settings.data_seed + (HELD_OUT_SEED_OFFSET if held_out else 0)
    if source == "on_policy":
        pairs = on_policy_pairs(
            pipeline,
            verifier,
            prompts,
            groups_per_prompt=_per_prompt(count, prompts),
            seed=seed,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
    else:
        pairs = off_policy_pairs(verifier, prompts, pairs_per_prompt=_per_prompt(count, prompts), seed=seed)
    return pairs.shuffle(seed=seed).select(range(min(count, len(pairs))))


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


def prepare_base(
    pipeline: StableDiffusionPipeline, verifiers: tuple[Verifier, Verifier], settings: DemoSettings, files: DemoFiles
) -> dict[str, Any]:
    """Write the features of real images and the base's samples; returns the measures of the base."""
    files.root.mkdir(parents=True, exist_ok=True)
    reference = reference_features(pipeline, verifiers[1])
    save_file({"features": reference.contiguous()}, files.reference_features)
    prompts = measurement_prompts(settings)
    images = draw(pipeline, prompts, settings)
    save_file({"images": to_bytes(images)}, files.base_images)
    return measure_images(images, prompts, verifiers, reference)


def prepare_pairs(
    pipeline: StableDiffusionPipeline, verifier: Verifier, settings: DemoSettings, source: str, files: DemoFiles
) -> None:
    """Write the training and held-out pairs of one source as Parquet."""
    files.pairs_directory(source).mkdir(parents=True, exist_ok=True)
    for held_out, path in ((False, files.train_pairs(source)), (True, files.held_out_pairs(source))):
        temporary = path.with_suffix(".part")
        make_pairs(pipeline, verifier, settings, source, held_out=held_out).to_parquet(temporary)
        os.replace(temporary, path)
