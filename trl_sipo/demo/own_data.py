# SPDX-License-Identifier: Apache-2.0
"""Data of the baselines that do not learn from ranked pairs of images: the steps of a sampler, and self-play."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import torch
from diffusers import StableDiffusionPipeline

from trl_sipo.adapters import adapter_for
from trl_sipo.demo.fashion import FashionPrompt
from trl_sipo.demo.latents import decode
from trl_sipo.demo.pairs import as_dataset, tinted_photographs
from trl_sipo.demo.sampling import prompt_ids, sample_images
from trl_sipo.demo.verifier import Verifier
from trl_sipo.generation.trajectories import record_trajectory, trajectory_pair


def trajectory_pairs(
    pipeline: StableDiffusionPipeline,
    verifier: Verifier,
    prompts: Sequence[FashionPrompt],
    *,
    groups_per_prompt: int,
    samples_per_group: int = 4,
    seed: int,
    min_gap: float = 0.05,
    num_inference_steps: int = 10,
    guidance_scale: float = 1.0,
) -> datasets.Dataset:
    """Like `pairs.on_policy_pairs`, but of all that the base went through: rows of `trajectory_pair`, for D3PO.

    The sampler is DDIM with eta = 1, which has probabilities, and not the one that the measurements draw with.

    Args:
        groups_per_prompt: Pairs attempted for each prompt.
        samples_per_group: Trajectories that a pair is picked from, by the verifier's log-probability of their images.
        min_gap: Pairs whose log-probabilities differ by less, in nats, are ties and dropped.
    """
    adapter = adapter_for(pipeline)
    generator = torch.Generator().manual_seed(seed)
    groups = [prompt for prompt in prompts for _ in range(groups_per_prompt)]
    sampler = {"num_steps": num_inference_steps, "guidance_scale": guidance_scale, "generator": generator}
    rows = []
    for prompt in groups:
        drawn = [record_trajectory(adapter, prompt.text, **sampler) for _ in range(samples_per_group)]
        images = decode(pipeline.vae, torch.stack([trajectory.latents[-1] for trajectory in drawn]))
        scores = verifier.scores(images, *prompt_ids([prompt] * samples_per_group))["log_prob"]
        best, worst = int(scores.argmax()), int(scores.argmin())
        if scores[best] - scores[worst] >= min_gap:
            rows.append(trajectory_pair(drawn[best], drawn[worst]))
    return datasets.Dataset.from_list(rows)


def self_play_pairs(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[FashionPrompt],
    *,
    pairs_per_prompt: int,
    seed: int,
    num_inference_steps: int = 10,
    guidance_scale: float = 1.0,
) -> datasets.Dataset:
    """Photographs of what the prompt says, each against a sample of the base: one round of SPIN-Diffusion.

    The photographs are upright, of the split that the base was trained on. Nothing is ranked: a photograph is chosen
    because it is one (Yuan et al. 2024, 2402.10210).
    """
    generator = torch.Generator().manual_seed(seed)
    asked = [prompt for prompt in prompts for _ in range(pairs_per_prompt)]
    photographs = tinted_photographs(*prompt_ids(asked), generator)
    texts = [prompt.text for prompt in asked]
    samples = sample_images(pipeline, texts, seed, num_inference_steps, guidance_scale)
    return as_dataset(asked, photographs, samples, "self_play")
