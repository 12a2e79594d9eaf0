# SPDX-License-Identifier: Apache-2.0
"""What the demo has to know of the media that its model draws: everything that differs between images and clips."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.demo.settings import DemoSettings
from trl_sipo.demo.verifier import Verifier


class Prompt(Protocol):
    """A combination of attributes with the sentence that describes it."""

    @property
    def text(self) -> str:
        """The sentence."""


class Medium(ABC):
    """Images or clips: the model, its data, its judges, and the words of the report.

    An instance holds no state, so that the training processes can be given one.
    """

    #: Plural, for sentences: "images".
    noun: ClassVar[str]
    #: What the verifiers' ceiling is measured on: "real test photographs".
    real: ClassVar[str]
    #: What an accuracy asks for: "class", "colour".
    attributes: ClassVar[tuple[str, ...]]
    #: Key of the ceiling's accuracy in all attributes, in the log of the verifiers' training.
    all_attributes: ClassVar[str]
    #: Folder of the shipped base model and verifiers.
    base: ClassVar[Path]
    #: Where the pairs of each source come from, for the report.
    sources: ClassVar[dict[str, str]]
    title: ClassVar[str]
    introduction: ClassVar[str]
    #: How the measures are defined.
    measures: ClassVar[str]
    sheet_caption: ClassVar[str]
    #: What the noise levels of the w(t) figure are counted in.
    level_label: ClassVar[str]
    #: Which levels those are.
    curve_levels: ClassVar[tuple[float, ...]]
    #: Fields of the trainer's configuration that the medium asks for.
    training_options: ClassVar[dict[str, Any]]

    @abstractmethod
    def load_pipeline(self, folder: Path) -> DiffusionPipeline:
        """The base model, in float32."""

    @abstractmethod
    def all_prompts(self) -> Sequence[Prompt]:
        """Every combination of attributes."""

    @abstractmethod
    def sample(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], seed: int, settings: DemoSettings
    ) -> torch.Tensor:
        """One sample per prompt, pixels in [-1, 1], media first: the same `seed` is the same starting noise."""

    @abstractmethod
    def judge(self, verifier: Verifier, samples: torch.Tensor, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
        """`<attribute>_correct` and `correct`, bool (n,), and the reward `log_prob`, float32 (n,)."""

    @abstractmethod
    def features(self, verifier: Verifier, samples: torch.Tensor) -> torch.Tensor:
        """What Frechet distance and diversity compare, float32 (n, features)."""

    @abstractmethod
    def class_ids(self, prompts: Sequence[Any]) -> torch.Tensor:
        """Groups within which diversity is measured, int64 (n,)."""

    @abstractmethod
    def reference_features(self, pipeline: DiffusionPipeline, second: Verifier) -> torch.Tensor:
        """Features of real media after the autoencoder: those of perfect samples."""

    @abstractmethod
    def make_pairs(
        self,
        pipeline: DiffusionPipeline,
        verifier: Verifier,
        settings: DemoSettings,
        source: str,
        *,
        held_out: bool,
    ) -> datasets.Dataset:
        """Training pairs, or held-out ones over prompts that training does not see, shuffled."""

    @abstractmethod
    def chosen_latents(
        self, adapter: BackboneAdapter, pairs: datasets.Dataset, count: int
    ) -> tuple[torch.Tensor, list[str]]:
        """Normalised latents of the chosen media of `count` evenly spaced pairs, and their prompts."""

    @abstractmethod
    def levels(self, adapter: BackboneAdapter) -> NoiseLevel:
        """The noise levels of `curve_levels`."""

    @abstractmethod
    def picture(self, sample: torch.Tensor) -> Image.Image:
        """One sample, uint8, for the sample sheet."""

    @abstractmethod
    def sheet_rows(self) -> list[int]:
        """Which prompts the sample sheet shows, as indices into `all_prompts()`."""

    @property
    def wanted(self) -> str:
        """The attributes as a phrase: "class, colour and direction"."""
        return f"{', '.join(self.attributes[:-1])} and {self.attributes[-1]}"


def pairs_per_prompt(count: int, prompts: Sequence[Prompt]) -> int:
    """How many pairs to ask for per prompt to have `count`: a fifth more, since near ties are dropped."""
    return -(-count * 6 // (5 * len(prompts)))


def evenly_spaced(pairs: PreferenceDataset, count: int) -> list[dict]:
    """At most `count` items from the beginning to the end."""
    count = min(count, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]
