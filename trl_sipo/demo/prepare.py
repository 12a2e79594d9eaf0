# SPDX-License-Identifier: Apache-2.0
"""The demo's data: preference pairs from the base model and from elsewhere, and the measure of the base itself."""

import json
import os
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from trl_sipo.demo.arm import DemoFiles, draw, measure_samples, measurement_prompts, to_bytes
from trl_sipo.demo.medium import Medium
from trl_sipo.demo.settings import DemoSettings
from trl_sipo.demo.verifier import Verifier


def protocol_digest(settings: DemoSettings, files: DemoFiles) -> str:
    """A short hash of the protocol and the base model, whichever arms and seeds are run.

    Results of another one are not mixed with it.
    """
    protocol = {name: value for name, value in asdict(settings).items() if name != "parts"}
    digest = blake2b(json.dumps(protocol, sort_keys=True).encode(), digest_size=6)
    for folder in (files.base_pipeline, files.verifiers):
        for weights in sorted(folder.rglob("*.safetensors")):
            digest.update(weights.read_bytes())
    return digest.hexdigest()


def prepare_base(
    pipeline: DiffusionPipeline,
    verifiers: tuple[Verifier, Verifier],
    settings: DemoSettings,
    files: DemoFiles,
    medium: Medium,
) -> dict[str, Any]:
    """Write the features of real media and the base's samples; returns the measures of the base."""
    files.root.mkdir(parents=True, exist_ok=True)
    reference = medium.reference_features(pipeline, verifiers[1])
    save_file({"features": reference.contiguous()}, files.reference_features)
    prompts = measurement_prompts(settings, medium)
    samples = draw(pipeline, prompts, settings, medium)
    save_file({"images": to_bytes(samples)}, files.base_images)
    return measure_samples(samples, prompts, verifiers, reference, medium)


def prepare_pairs(
    pipeline: DiffusionPipeline,
    verifier: Verifier,
    settings: DemoSettings,
    source: str,
    files: DemoFiles,
    medium: Medium,
) -> None:
    """Write the training and held-out pairs of one source as Parquet."""
    files.pairs_directory(source).mkdir(parents=True, exist_ok=True)
    for held_out, path in ((False, files.train_pairs(source)), (True, files.held_out_pairs(source))):
        temporary = path.with_suffix(".part")
        medium.make_pairs(pipeline, verifier, settings, source, held_out=held_out).to_parquet(temporary)
        os.replace(temporary, path)
