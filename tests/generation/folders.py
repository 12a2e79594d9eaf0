# SPDX-License-Identifier: Apache-2.0
"""Folders of samples in tests: small sets of prompts, what a folder holds, and drawing in processes of their own."""

from pathlib import Path

from tests.tiny_models import tiny_stable_diffusion
from trl_sipo.generation.prompt_sets import PromptRecord
from trl_sipo.generation.sampling import SamplingSettings, draw_samples

SETTINGS = SamplingSettings(num_inference_steps=2, samples_per_prompt=3, seed=5)


def prompt_set(count: int = 4) -> list[PromptRecord]:
    """Prompts of different lengths."""
    return [PromptRecord(f"p-{number}", "a cat " * (number % 3 + 1), category="cats") for number in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, by its path in it."""
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def draw(folder: str, count: int = 4, batch_size: int = 2) -> None:
    """What a process of a test does; a function of a module, so that it can be called in another one."""
    draw_samples(tiny_stable_diffusion(), prompt_set(count), folder, SETTINGS, batch_size=batch_size)
