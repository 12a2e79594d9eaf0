# SPDX-License-Identifier: Apache-2.0
"""The image demo's medium: tinted photographs of clothes at 32x32, drawn by a tiny Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.demo.fashion import (
    ASSETS,
    CLASSES,
    COLOURS,
    IMAGE_SIZE,
    FashionPrompt,
    all_prompts,
    colour_values,
    load_split,
    split_prompts,
    tint,
)
from trl_sipo.demo.latents import decode, encode
from trl_sipo.demo.medium import Medium, evenly_spaced, pairs_per_prompt
from trl_sipo.demo.model import load_pipeline_assets
from trl_sipo.demo.own_data import self_play_pairs, trajectory_pairs
from trl_sipo.demo.pairs import off_policy_pairs, on_policy_pairs
from trl_sipo.demo.sampling import prompt_ids, sample_images
from trl_sipo.demo.settings import HELD_OUT_SEED_OFFSET, SOURCES, DemoSettings
from trl_sipo.demo.verifier import Verifier


class ImageMedium(Medium):
    """Images of tinted clothes and shoes."""

    noun = "images"
    real = "real test photographs"
    attributes = ("class", "colour")
    all_attributes = "both"
    base = ASSETS
    sources = SOURCES
    title = "Diffusion-DPO, DPO-C&M, SIPO and Poly-DPO on a small text-to-image model"
    introduction = (
        "A real but tiny Stable Diffusion pipeline draws tinted clothes and shoes from prompts such as 'a red "
        "sneaker'. Each method trains it on the same preference pairs, with the same noise per seed, through the same "
        "trainers as any other model. This page shows what was measured on this machine, and nothing else."
    )
    measures = (
        "Accuracy: share of images in which a verifier, trained on photographs that the model never saw, finds both "
        "class and colour. The second verifier did not rank the pairs. Frechet distance: to real test photographs, in "
        "the second verifier's features. Diversity: standard deviation of these features within a class. Brackets: "
        "smallest and largest value over seeds."
    )
    sheet_caption = "Same prompts and starting noise in each row; first seed, last step."
    level_label = "timestep t (0 is clean)"
    # Denser where w(t) moves.
    curve_levels = (*range(0, 200, 10), *range(200, 1000, 50))
    training_options = {}

    def load_pipeline(self, folder: Path) -> StableDiffusionPipeline:
        """See `load_pipeline_assets`."""
        return load_pipeline_assets(folder)

    def all_prompts(self) -> list[FashionPrompt]:
        """All 64 combinations of class and colour."""
        return all_prompts()

    def sample(
        self, pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int, settings: DemoSettings
    ) -> torch.Tensor:
        """Images (n, 3, 32, 32)."""
        return sample_images(pipeline, prompts, seed, settings.num_inference_steps, settings.guidance_scale)

    def judge(
        self, verifier: Verifier, samples: torch.Tensor, prompts: Sequence[FashionPrompt]
    ) -> dict[str, torch.Tensor]:
        """The verifier's scores; `correct` is both class and colour."""
        scores = verifier.scores(samples, *prompt_ids(prompts))
        return {**scores, "correct": scores["both_correct"]}

    def features(self, verifier: Verifier, samples: torch.Tensor) -> torch.Tensor:
        """The verifier's features."""
        return verifier.features(samples)

    def class_ids(self, prompts: Sequence[FashionPrompt]) -> torch.Tensor:
        """What is drawn, whichever its colour."""
        return prompt_ids(prompts)[0]

    def reference_features(self, pipeline: StableDiffusionPipeline, second: Verifier) -> torch.Tensor:
        """Those of the real test photographs in random colours."""
        generator = torch.Generator().manual_seed(0)
        split = load_split("test")
        colour_ids = torch.randint(len(COLOURS), (len(split),), generator=generator)
        real = tint(split.images, colour_values(colour_ids, generator))
        return second.features(decode(pipeline.vae, encode(pipeline.vae, real)[0]))

    def make_pairs(
        self,
        pipeline: StableDiffusionPipeline,
        verifier: Verifier,
        settings: DemoSettings,
        source: str,
        *,
        held_out: bool,
    ) -> datasets.Dataset:
        """PNG pairs, or trajectories; see `pairs` and `own_data`."""
        train_prompts, held_out_prompts = split_prompts()
        prompts, count = (held_out_prompts, settings.num_held_out) if held_out else (train_prompts, settings.num_pairs)
        seed = settings.data_seed + (HELD_OUT_SEED_OFFSET if held_out else 0)
        number = pairs_per_prompt(count, prompts)
        sampler = {
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
        }
        makers = {
            "off_policy": lambda: off_policy_pairs(verifier, prompts, pairs_per_prompt=number, seed=seed),
            "on_policy": lambda: on_policy_pairs(
                pipeline, verifier, prompts, groups_per_prompt=number, seed=seed, **sampler
            ),
            "trajectories": lambda: trajectory_pairs(
                pipeline, verifier, prompts, groups_per_prompt=number, seed=seed, **sampler
            ),
            "self_play": lambda: self_play_pairs(pipeline, prompts, pairs_per_prompt=number, seed=seed, **sampler),
        }
        pairs = makers[source]()
        return pairs.shuffle(seed=seed).select(range(min(count, len(pairs))))

    def chosen_latents(
        self, adapter: BackboneAdapter, pairs: datasets.Dataset, count: int
    ) -> tuple[torch.Tensor, list[str]]:
        """The images, encoded."""
        items = evenly_spaced(PreferenceDataset(pairs, transform=PairedTransform(IMAGE_SIZE)), count)
        latents = adapter.encode_media(torch.stack([item["chosen_pixels"] for item in items]))
        return latents, [item["prompt"] for item in items]

    def levels(self, adapter: BackboneAdapter) -> NoiseLevel:
        """The schedule's, at `curve_levels` as timesteps."""
        return adapter.noise_schedule.level(torch.tensor(self.curve_levels))

    def picture(self, sample: torch.Tensor) -> Image.Image:
        """uint8 (3, 32, 32) as an image."""
        return Image.fromarray(sample.permute(1, 2, 0).numpy())

    def sheet_rows(self) -> list[int]:
        """One class and one colour a row: prompts come class by class, each with its colours in turn."""
        return [row * len(COLOURS) + row for row in range(len(CLASSES))]


IMAGES = ImageMedium()
