# SPDX-License-Identifier: Apache-2.0
"""The video demo's medium: moving clothes, 5 frames at 32x32, drawn by a tiny Wan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from diffusers import WanPipeline
from PIL import Image

from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.demo.fashion import IMAGE_SIZE
from trl_sipo.demo.medium import Medium, evenly_spaced, pairs_per_prompt
from trl_sipo.demo.settings import HELD_OUT_SEED_OFFSET, DemoSettings
from trl_sipo.demo.verifier import Verifier
from trl_sipo.demo.video.coding import decode_many, encode_many, sample_clips
from trl_sipo.demo.video.model import VIDEO_ASSETS, load_video_pipeline
from trl_sipo.demo.video.pairs import off_policy_pairs, on_policy_pairs
from trl_sipo.demo.video.sprites import (
    DIRECTIONS,
    MOVING_COLOURS,
    NUM_FRAMES,
    VideoPrompt,
    all_video_prompts,
    moving_photographs,
    prompt_ids,
    random_clips,
    split_video_prompts,
)
from trl_sipo.demo.video.verifier import clip_features, judge_clips

NUM_REFERENCE_CLIPS = 500


class VideoMedium(Medium):
    """Clips of moving clothes."""

    noun = "clips"
    real = "clips of real test photographs"
    attributes = ("class", "colour", "direction")
    all_attributes = "all"
    base = VIDEO_ASSETS
    sources = {
        "off_policy": "clips that the base model could not have drawn: photographs, turned and mirrored",
        "on_policy": "clips sampled from the base model itself",
    }
    title = "Diffusion-DPO and SIPO on a small text-to-video model"
    introduction = (
        "A real but tiny Wan pipeline (flow matching) draws clips of moving clothes from prompts such as 'a red "
        "sneaker moving left'. Each method trains it on the same preference pairs, with the same noise per seed, "
        "through the same trainers as any other model. This page shows what was measured on this machine, and nothing "
        "else."
    )
    measures = (
        "Accuracy: share of clips in which class, colour and direction are right: class and colour by a verifier of "
        "close-ups, trained on photographs that the model never saw; the direction by the slope of the sprite's "
        "centre of mass. The second verifier did not rank the pairs; its direction is the same. Frechet distance: to "
        "clips of real test photographs, in the second verifier's features and the velocity. Diversity: standard "
        "deviation of these features within a class. Brackets: smallest and largest value over seeds."
    )
    sheet_caption = (
        f"Each cell holds the {NUM_FRAMES} frames of one clip. Same prompts and starting noise in each row; first "
        "seed, last step."
    )
    level_label = "sigma (0 is clean)"
    curve_levels = tuple(round(0.04 * step, 2) for step in range(1, 25))
    training_options = {"resolution": [IMAGE_SIZE], "num_frames": NUM_FRAMES}

    def load_pipeline(self, folder: Path) -> WanPipeline:
        """See `load_video_pipeline`."""
        return load_video_pipeline(folder)

    def all_prompts(self) -> list[VideoPrompt]:
        """All 64 combinations of class, colour and direction."""
        return all_video_prompts()

    def sample(self, pipeline: WanPipeline, prompts: Sequence[str], seed: int, settings: DemoSettings) -> torch.Tensor:
        """Clips (n, 3, 5, 32, 32)."""
        return sample_clips(pipeline, prompts, seed, settings.num_inference_steps, settings.guidance_scale)

    def judge(
        self, verifier: Verifier, samples: torch.Tensor, prompts: Sequence[VideoPrompt]
    ) -> dict[str, torch.Tensor]:
        """See `judge_clips`."""
        return judge_clips(verifier, samples, prompt_ids(prompts))

    def features(self, verifier: Verifier, samples: torch.Tensor) -> torch.Tensor:
        """See `clip_features`."""
        return clip_features(verifier, samples)

    def class_ids(self, prompts: Sequence[VideoPrompt]) -> torch.Tensor:
        """What moves, whichever its colour and direction."""
        return prompt_ids(prompts)[:, 0]

    def reference_features(self, pipeline: WanPipeline, second: Verifier) -> torch.Tensor:
        """Those of clips of real test photographs."""
        adapter, generator = adapter_for(pipeline), torch.Generator().manual_seed(0)
        clips, _ = random_clips(moving_photographs("test"), NUM_REFERENCE_CLIPS, generator)
        return clip_features(second, decode_many(adapter, encode_many(adapter, clips)))

    def make_pairs(
        self, pipeline: WanPipeline, verifier: Verifier, settings: DemoSettings, source: str, *, held_out: bool
    ) -> datasets.Dataset:
        """Pairs of latents, see `pairs`."""
        adapter = adapter_for(pipeline)
        train_prompts, held_out_prompts = split_video_prompts()
        prompts, count = (held_out_prompts, settings.num_held_out) if held_out else (train_prompts, settings.num_pairs)
        seed = settings.data_seed + (HELD_OUT_SEED_OFFSET if held_out else 0)
        number = pairs_per_prompt(count, prompts)
        if source == "on_policy":
            sampling = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
            pairs = on_policy_pairs(adapter, verifier, prompts, groups_per_prompt=number, seed=seed, **sampling)
        else:
            pairs = off_policy_pairs(adapter, verifier, prompts, pairs_per_prompt=number, seed=seed)
        return pairs.shuffle(seed=seed).select(range(min(count, len(pairs))))

    def chosen_latents(
        self, adapter: BackboneAdapter, pairs: datasets.Dataset, count: int
    ) -> tuple[torch.Tensor, list[str]]:
        """The latents, as the pairs hold them."""
        items = evenly_spaced(PreferenceDataset(pairs), count)
        return torch.stack([item["chosen_latents"] for item in items]), [item["prompt"] for item in items]

    def levels(self, adapter: BackboneAdapter) -> NoiseLevel:
        """The schedule's, at `curve_levels` as sigmas."""
        return adapter.noise_schedule.level(torch.tensor(self.curve_levels))

    def picture(self, sample: torch.Tensor) -> Image.Image:
        """uint8 (3, 5, 32, 32): the frames from left to right."""
        return Image.fromarray(sample.permute(2, 1, 3, 0).flatten(1, 2).numpy())

    def sheet_rows(self) -> list[int]:
        """Two clips of each class, so that every colour and every direction is shown twice."""
        per_class, size = len(MOVING_COLOURS) * len(DIRECTIONS), len(DIRECTIONS)
        return [
            class_index * per_class + (class_index + turn) % size * size + (class_index + 2 * turn) % size
            for class_index in range(size)
            for turn in (0, 1)
        ]


CLIPS = VideoMedium()
