# SPDX-License-Identifier: Apache-2.0
"""Does the image show the text that the prompt puts in quotes? By a reader of text (OCR) and the edit distance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Final, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.rewards.base import Media, RewardInfo
from trl_sipo.rewards.batched import BatchedReward

TextReader: TypeAlias = Callable[[Image.Image], Sequence[str]]
"""From an RGB image to the pieces of text in it, in reading order; none for an image without text."""

# In single quotes an apostrophe may stand, with letters on both sides; those in "a dog's bone" and "a cat's toy" quote
# nothing.
_QUOTED: Final = re.compile(
    r'"(?P<plain>[^"]+)"|“(?P<curly>[^”]+)”|«(?P<angle>[^»]+)»|「(?P<corner>[^」]+)」'
    r"|(?<!\w)'(?P<single>(?:[^']|(?<=\w)'(?=\w))+)'(?!\w)|‘(?P<curly_single>(?:[^’]|(?<=\w)’(?=\w))+)’(?!\w)"
)


class TextRendering(BatchedReward):
    """How much of the quoted text is in the image: 1 less the edit distance, by the length of the longer text.

    Capitals and spaces do not count, for readers often lose them; text that was not asked for does count. Of several
    quotes in a prompt the texts are joined.

    Args:
        reader: Of text in images; None: RapidOCR, of the extra `ocr` (Chinese and English, its weights come with it).
        batch_size: Images at once.
        frames_per_video: How many frames of a video are read; without it, videos are refused.

    Raises:
        ConfigurationError: RapidOCR is asked for and not installed.
    """

    def __init__(
        self, reader: TextReader | None = None, *, batch_size: int = 32, frames_per_video: int | None = None
    ) -> None:
        convention = "1 - edit distance(quoted, read) / longer length; case and spaces do not count"
        self.reader = rapid_ocr() if reader is None else reader
        name = f"rapidocr {version('rapidocr')}" if reader is None else getattr(reader, "__qualname__", repr(reader))
        super().__init__(
            RewardInfo("text_rendering", convention, "Apache-2.0"),
            settings={"reader": name},
            batch_size=batch_size,
            frames_per_video=frames_per_video,
        )

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Tensor:
        """See `trl_sipo.rewards.base.Reward`.

        Raises:
            DatasetError: A prompt that quotes nothing, before anything is read.
        """
        for prompt in prompts:
            quoted_text(prompt)
        return super().score(media, prompts)

    def score_images(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """See `BatchedReward.score_images`."""
        pairs = zip(prompts, images, strict=True)
        return torch.tensor([likeness(quoted_text(prompt), " ".join(self.reader(image))) for prompt, image in pairs])


def rapid_ocr() -> TextReader:
    """RapidOCR's reader.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ConfigurationError(
            "Text in images is read by RapidOCR, which is not installed: pip install 'trl-sipo[ocr]'; or give a "
            "`reader` of your own."
        ) from error
    engine = RapidOCR(params={"Global.log_level": "error"})
    return lambda image: engine(image).txts or ()


def quoted_text(prompt: str) -> str:
    """What a prompt puts in quotes, such as OPEN in 'a sign that says "OPEN"'; of several quotes, joined by spaces.

    Raises:
        DatasetError: It quotes nothing.
    """
    found = [next(text for text in match.groups() if text is not None) for match in _QUOTED.finditer(prompt)]
    text = " ".join(found)
    if not text.strip():
        raise DatasetError(
            f'the prompt {prompt!r} quotes no text that an image could show; write it like: a sign that says "OPEN".'
        )
    return text


def likeness(text: str, other: str) -> float:
    """1 for texts that differ in case and spaces alone, 0 for texts that have nothing in common.

    It is 1 less the edit distance, in units of the length of the longer text.
    """
    text, other = ("".join(one.casefold().split()) for one in (text, other))
    longer = max(len(text), len(other))
    return 1 - edit_distance(text, other) / longer if longer else 1.0


def edit_distance(text: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of characters from one text to the other (Levenshtein)."""
    # Distances of the first `row` characters of `text` to every beginning of `other`.
    distances = list(range(len(other) + 1))
    for row, letter in enumerate(text, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other_letter in enumerate(other, start=1):
            replaced = diagonal + (letter != other_letter)
            diagonal = distances[column]
            distances[column] = min(replaced, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]
