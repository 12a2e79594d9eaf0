# SPDX-License-Identifier: Apache-2.0
"""The sample grids of a run, small enough to lie within one page: chosen, scaled down and encoded again."""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from trl_sipo.errors import DatasetError
from trl_sipo.reporting.run_lines import file_inside, json_object

FORMATS = ("PNG", "WEBP", "JPEG")
# What a clip counts for among the pictures, and what is kept of it.
CLIP_COUNTS = 8
_CLIP_FRAMES, _CLIP_SIDE = 32, 288
_LOSSLESS_SIDE = 96  # pixels; smaller pictures are kept to the bit
_MOST_PIXELS, _MOST_FRAME_PIXELS = 50_000_000, 400_000_000  # of a picture, and of all frames of a clip
_STEP = re.compile(r"step-(\d{1,15})")
_GRID_GAP = 4  # pixels between the two columns of a grid
_LONGEST_PROMPT, _MOST_PROMPTS, _MOST_STEPS = 400, 1000, 100_000
GRID = "grid"


@dataclass(frozen=True)
class Limits:
    """How much of the samples a page holds.

    Attributes:
        pictures: Of one run; a clip counts for `CLIP_COUNTS`.
        side: The longest of a picture, in pixels.
    """

    pictures: int = 160
    side: int = 384


@dataclass(frozen=True)
class Picture:
    """A picture or a clip, encoded as WebP.

    Attributes:
        data: Of the file.
        width, height: In pixels.
        still: The first frame of a clip, for those who want nothing to move; empty of a picture.
    """

    data: bytes
    width: int
    height: int
    still: bytes = b""


@dataclass
class PromptSamples:
    """What was drawn for one prompt.

    Attributes:
        prompt: Empty where it is not known.
        base: By the reference.
        current: By the policy, by step.
    """

    prompt: str
    base: Picture | None = None
    current: dict[int, Picture] = field(default_factory=dict)


@dataclass
class Samples:
    """The sample grids of a run.

    Attributes:
        rows: Prompt by prompt.
        facts: How they were drawn: seed, steps of the sampler, guidance.
        notes: What was left out or could not be read.
    """

    rows: list[PromptSamples]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """All steps with a picture."""
        return sorted({step for row in self.rows for step in row.current})


class PictureReader:
    """Reads and encodes pictures, and remembers those it has seen: a run that goes on is read again and again."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._seen: dict[tuple[str, int, int, str], Picture] = {}
        self._used: dict[tuple[str, int, int, str], Picture] = {}

    def read(self, folder: Path, name: str, part: str = "") -> Picture:
        """One picture or clip below a folder.

        Args:
            part: "left" or "right" half of a grid; empty: the whole.

        Raises:
            DatasetError: It is not there, leads out of the folder, does not open, or is too large.
        """
        path = file_inside(folder, name)
        if path is None:
            raise DatasetError(f"{name} is not there, or is no file of this folder.")
        state = path.stat()
        key = (str(path), state.st_mtime_ns, state.st_size, part)
        if key not in self._seen:
            self._seen[key] = _read_picture(path, name, part, self.limits.side)
        self._used[key] = self._seen[key]
        return self._used[key]

    def forget_unused(self) -> None:
        """Forget what has not been read since this was last called: as a run goes on, other steps of it are shown."""
        self._seen, self._used = self._used, {}


def _read_picture(path: Path, name: str, part: str, side: int) -> Picture:
    try:
        with Image.open(path, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            pixels = image.width * image.height
            if pixels > _MOST_PIXELS or pixels * frames > _MOST_FRAME_PIXELS:
                size = f"{image.width} x {image.height} pixels, {frames} frame(s)"
                raise DatasetError(f"{name} is too large to be shown ({size}).")
            return _encoded(image, frames, part, side)
    except UnidentifiedImageError as error:
        raise DatasetError(f"{name} is no picture that can be read.") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # of broken files
        raise DatasetError(f"{name} does not open ({type(error).__name__}).") from error


def _encoded(image: Image.Image, num_frames: int, part: str, side: int) -> Picture:
    if num_frames == 1:
        shown = _fitted(_half(image.convert("RGB"), part), side)
        return Picture(_webp([shown]), *shown.size)
    duration = float(image.info.get("duration", 0) or 100)
    kept = evenly(range(num_frames), _CLIP_FRAMES)
    frames = []
    for index in kept:
        image.seek(index)
        frames.append(_fitted(_half(image.convert("RGB"), part), min(side, _CLIP_SIDE)))
    return Picture(_webp(frames, duration * num_frames / len(kept)), *frames[0].size, _webp(frames[:1]))


def _half(image: Image.Image, part: str) -> Image.Image:
    width = (image.width - _GRID_GAP) // 2
    if not part or width < 1:
        return image
    left = 0 if part == "left" else image.width - width
    return image.crop((left, 0, left + width, image.height))


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _webp(frames: Sequence[Image.Image], duration: float = 0) -> bytes:
    buffer = io.BytesIO()
    animation = {"save_all": True, "append_images": list(frames[1:]), "duration": round(duration), "loop": 0}
    options = {"lossless": max(frames[0].size) <= _LOSSLESS_SIDE, "quality": 82, "method": 4}
    frames[0].save(buffer, "WEBP", **options, **(animation if len(frames) > 1 else {}))
    return buffer.getvalue()


def evenly(values: Sequence[int], count: int) -> list[int]:
    """`count` of the values, or all if they are fewer: evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    if count == 1:
        return [values[-1]]
    return [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]


def read_samples(folder: Path, reader: PictureReader) -> Samples | None:
    """The sample grids of a run's folder; None if there are none."""
    place = folder / "samples"
    if not place.is_dir() or not place.resolve().is_relative_to(folder.resolve()):
        return None
    steps: dict[int, str] = {}
    for path in place.iterdir():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir() and len(steps) < _MOST_STEPS:
            steps[int(match[1])] = path.name
    found = _single_pictures(place, steps, reader) if steps else _grids(place, reader)
    return found if found is not None and found.steps else None


def _single_pictures(place: Path, steps: dict[int, str], reader: PictureReader) -> Samples:
    description = file_inside(place, "samples.json")
    samples = Samples([])
    if description is not None:
        try:
            samples.facts = json_object(description)
        except DatasetError as error:
            samples.notes.append(str(error))
    prompts = samples.facts.get("prompts")
    prompts = prompts[:_MOST_PROMPTS] if isinstance(prompts, list) else []
    last = place / steps[max(steps)]
    names = sorted(path.name for path in last.iterdir() if re.fullmatch(r"\d{1,6}\.(png|webp)", path.name))
    is_clip = any(name.endswith(".webp") for name in names)
    shown_names, shown_steps = _chosen(names, sorted(steps), is_clip, reader.limits, samples)
    for name in shown_names:
        index = int(name.split(".")[0])
        prompt = prompts[index] if index < len(prompts) and isinstance(prompts[index], str) else ""
        row = PromptSamples(prompt[:_LONGEST_PROMPT])
        row.base = _read_or_note(reader, place, f"base/{name}", samples)
        for step in shown_steps:
            if (picture := _read_or_note(reader, place, f"{steps[step]}/{name}", samples)) is not None:
                row.current[step] = picture
        samples.rows.append(row)
    return samples


def _chosen(
    names: list[str], steps: list[int], is_clip: bool, limits: Limits, samples: Samples
) -> tuple[list[str], list[int]]:
    """Which prompts and steps are shown: all steps of some prompts rather than some steps of all."""
    budget = max(2, limits.pictures // CLIP_COUNTS if is_clip else limits.pictures)
    num_names = min(len(names), max(1, budget // min(5, len(steps) + 1)))
    num_steps = max(1, budget // max(num_names, 1) - 1)
    shown_names, shown_steps = names[:num_names], evenly(steps, num_steps)
    if len(shown_names) < len(names):
        samples.notes.append(f"Shown are the first {len(shown_names)} of {len(names)} prompts.")
    if len(shown_steps) < len(steps):
        samples.notes.append(f"Shown are {len(shown_steps)} of {len(steps)} steps, evenly spaced.")
    if len(shown_names) < len(names) or len(shown_steps) < len(steps):
        samples.notes.append("`--max_pictures` raises the limit.")
    return shown_names, shown_steps


def _read_or_note(reader: PictureReader, place: Path, name: str, samples: Samples, part: str = "") -> Picture | None:
    try:
        return reader.read(place, name, part)
    except DatasetError as error:
        samples.notes.append(f"Left out: {error}")
        return None


def _grids(place: Path, reader: PictureReader) -> Samples | None:
    """Whole grids, reference left and policy right, of runs that kept no single pictures."""
    files = {
        int(match[1]): path.name
        for path in place.glob("step-*.png")
        if (match := _STEP.fullmatch(path.stem)) is not None
    }
    if not files:
        return None
    clips = {step: name for step, name in files.items() if file_inside(place, name.replace(".png", ".webp"))}
    samples = Samples([PromptSamples(GRID)])
    row = samples.rows[0]
    budget = reader.limits.pictures // (CLIP_COUNTS if clips else 1) - 1
    for step in evenly(sorted(files), max(1, budget)):
        name = files[step].replace(".png", ".webp") if step in clips else files[step]
        picture = _read_or_note(reader, place, name, samples, "right")
        if picture is not None:
            row.current[step] = picture
            row.base = _read_or_note(reader, place, name, samples, "left")
    if len(row.current) < len(files):
        samples.notes.append(f"Shown are {len(row.current)} of {len(files)} grids.")
    return samples


def facts_of(samples: Samples) -> str:
    """How the samples were drawn, in a line."""
    names = {"seed": "seed", "num_inference_steps": "sampler steps", "guidance_scale": "guidance", "size": "size"}
    values = {text: samples.facts[name] for name, text in names.items() if samples.facts.get(name) is not None}
    return ", ".join(f"{text} {json.dumps(value)[:40]}" for text, value in values.items())
