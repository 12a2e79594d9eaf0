# SPDX-License-Identifier: Apache-2.0
"""The pairs of a round: of ranked samples, of real images against samples, and those of earlier rounds again."""

import io
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from trl_sipo.data.formats import detect_format
from trl_sipo.data.images import open_image
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.seeding import mix_seed
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.feedback.feedback import PAIRS_FILE, pair_features, stored_sample, write_rows
from trl_sipo.generation.media_files import VIDEO_SUFFIX
from trl_sipo.generation.prompt_sets import PromptRecord, load_prompts
from trl_sipo.generation.sampling import Sample, SamplingSettings, read_samples
from trl_sipo.online.config import OnlineConfig

# What a number is drawn for, as the last part of its seed.
PROMPTS, SAMPLES, TRAINING, REPLAY, REAL_IMAGES = range(5)


def round_seed(config: OnlineConfig, number: int, purpose: int) -> int:
    """The seed of one purpose in one round, in [0, 2**32)."""
    return mix_seed(config.seed, number, purpose) % 2**32


def round_prompts(config: OnlineConfig, number: int) -> list[PromptRecord]:
    """The prompts of a round."""
    return load_prompts(config.prompts, limit=config.prompts_per_round, seed=round_seed(config, number, PROMPTS))


def round_sampling(config: OnlineConfig, number: int) -> SamplingSettings:
    """How a round's samples are drawn: noise that no other round has."""
    return replace(config.sampling, seed=round_seed(config, number, SAMPLES))


def read_pairs(folder: Path) -> datasets.Dataset:
    """The pairs of a round's folder."""
    return load_preference_dataset(str(folder / PAIRS_FILE))


def training_rows(config: OnlineConfig, number: int, folders: Sequence[Path]) -> tuple[datasets.Dataset, int]:
    """The pairs that a round trains on, and how many of them are of earlier rounds.

    Args:
        folders: Of rounds 0 to `number`.

    Returns:
        The round's own pairs, all of them, then pairs of earlier rounds, drawn evenly from all of these without
        replacement, as many as make up the share `replay` of the whole, if there are so many.
    """
    own = read_pairs(folders[number])
    if not config.replay or not number:
        return own, 0
    earlier = datasets.concatenate_datasets([read_pairs(folder) for folder in folders[:number]])
    count = min(len(earlier), round(len(own) * config.replay / (1 - config.replay)))
    draw = random.Random(round_seed(config, number, REPLAY))
    replayed = earlier.select(sorted(draw.sample(range(len(earlier)), count)))
    return datasets.concatenate_datasets([own, replayed]), count


class RealImages:
    """The rows of a dataset by their prompts: what self-play prefers to samples.

    Args:
        name, split: Of the dataset; rows of `prompt` and `image`, or pairs, of which the chosen image is taken.

    Raises:
        DatasetError: It is not there, or holds no images with prompts.
    """

    def __init__(self, name: str, split: str):
        self.name = name
        self.rows: Any = load_preference_dataset(name, split=split)
        self.format = detect_format(self.rows.column_names, "chosen").with_arms("chosen")
        self.by_prompt: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.rows.select_columns([self.format.prompt])[self.format.prompt]):
            self.by_prompt.setdefault(str(prompt).strip(), []).append(row)

    def check(self, prompts: Sequence[PromptRecord]) -> None:
        """Raise [`DatasetError`] for prompts that no row has."""
        missing = [record.prompt for record in prompts if record.prompt not in self.by_prompt]
        if missing:
            raise DatasetError(
                f"{len(missing)} of {len(prompts)} prompts have no image in {self.name!r}, such as {missing[0]!r}. "
                "Take the prompts from it: `prompts: dataset:NAME`."
            )

    def stored(self, prompt: str, seed: int) -> dict[str, Any]:
        """One of the images of a prompt, chosen by `seed`, as a PNG that `datasets` stores."""
        rows = self.by_prompt[prompt]
        number = rows[seed % len(rows)]
        where = f"{self.name}, row {number}"
        image = open_image(self.format.read(self.rows[number], where=where)["chosen"], where=where)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}


def write_self_play_pairs(config: OnlineConfig, number: int, folder: Path, real: RealImages) -> int:
    """Write pairs of a real image and a sample of the policy, one for each sample; returns how many.

    This is the data of SPIN-Diffusion (Yuan et al. 2024, arXiv 2402.10210): the winner is drawn from the data, the
    loser from the previous policy.

    Raises:
        ConfigurationError: The samples are videos.
        DatasetError: Prompts without an image, or an image that is broken.
        StorageError: The file cannot be written.
    """
    samples = list(read_samples(folder / "samples"))
    if samples[0].path.suffix == VIDEO_SUFFIX:
        raise ConfigurationError("`mode: self_play` knows images only. Set `sampling.num_frames` to 1.")

    def row(sample: Sample) -> dict[str, Any]:
        record, digits = sample.record, int.from_bytes(sample.record.prompt_id.encode(), "big")
        seed = mix_seed(config.seed, number, REAL_IMAGES, digits, sample.index)
        return {
            "prompt": record.prompt,
            "chosen": real.stored(record.prompt, seed),
            "rejected": stored_sample(sample),
            "margin": None,
            "category": record.category,
            "source": "self_play",
            "pair_id": f"{record.prompt_id}-real-{sample.index:03d}",
        }

    write_rows(folder / PAIRS_FILE, pair_features(datasets.Image()), samples, row)
    return len(samples)
