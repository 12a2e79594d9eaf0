# SPDX-License-Identifier: Apache-2.0
"""Samples of a model for a set of prompts: every model starts from the same noise, and a stopped run goes on.

    <folder>/settings.json                  what the samples are a function of
    <folder>/prompts.jsonl                  the prompts
    <folder>/<prompt_id>/<index:03d>.png    the samples of a prompt, or .mp4

A file is whole or not there. Which samples are drawn in one batch follows from the prompts and the size of a batch
alone: whoever draws them, and however often the work is interrupted, their bytes are the same.
"""

import dataclasses
import inspect
import logging
import math
import operator
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from trl_sipo.adapters import adapter_for
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.adapters.call_defaults import call_default
from trl_sipo.data.seeding import mix_seed
from trl_sipo.data.video_writing import check_video_writing
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError
from trl_sipo.generation.identity import (
    check_folder,
    identity,
    read_prompts,
    read_settings,
    write_folder,
)
from trl_sipo.generation.media_files import (
    IMAGE_SUFFIX,
    VIDEO_SUFFIX,
    open_sample,
    write_image,
    write_video,
)
from trl_sipo.generation.names import check_folder_names, links_out_of
from trl_sipo.generation.processes import process_state
from trl_sipo.generation.prompt_sets import PromptRecord

logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 16


@dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn; None takes what the pipeline does by itself.

    Args:
        num_inference_steps: Steps of the sampler.
        guidance_scale: Of classifier-free guidance, or the scale that a guidance-distilled model is told.
        height, width: In pixels.
        num_frames: Of a video model; 1 draws images.
        frame_rate: Frames per second that a video model is told, and at which its videos play.
        samples_per_prompt: How many are drawn for each.
        seed: Of the noise, together with the prompt's name and the sample's number.

    Raises:
        ConfigurationError: A number out of range.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    samples_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "height", "width", "num_frames", "samples_per_prompt"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(f"`{name}` must be a positive integer, got {value!r}.")
        for name, least in (("guidance_scale", -math.inf), ("frame_rate", 0.0)):
            value = getattr(self, name)
            if value is not None and not least < value < math.inf:
                raise ConfigurationError(f"`{name}` must be a {'positive ' * (least == 0)}number, got {value!r}.")
        operator.index(self.seed)

    def resolved(self, adapter: BackboneAdapter) -> "SamplingSettings":
        """The same with a value in every place, but for a guidance scale that the pipeline does not take.

        Raises:
            ConfigurationError: The model does not take the size, the length or a guidance scale.
        """
        known = inspect.signature(type(adapter.pipeline).__call__).parameters
        own = {
            "num_inference_steps": call_default(adapter.pipeline, "num_inference_steps"),
            "guidance_scale": known[adapter.guidance_argument].default if adapter.guidance_argument in known else None,
            "height": adapter.default_size[0],
            "width": adapter.default_size[1],
            "num_frames": adapter.default_num_frames,
            "frame_rate": known["frame_rate"].default if "frame_rate" in known else adapter.frame_rate,
        }
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        full = SamplingSettings(**{**own, **given})
        adapter.validate_size(full.height, full.width, full.num_frames)
        if self.guidance_scale is not None and adapter.guidance_argument not in known:
            raise ConfigurationError(
                f"guidance_scale={self.guidance_scale}, but the call of {adapter.pipeline_class_name} takes none: "
                "leave it."
            )
        return full


class Sample(NamedTuple):
    """One sample of a folder."""

    record: PromptRecord
    index: int
    path: Path

    def open(self) -> Any:
        """An RGB image, or the frames of a video, uint8 (frames, height, width, 3)."""
        return open_sample(self.path)


class DrawnSamples(NamedTuple):
    """What all processes did: samples drawn, samples that were there, and of those drawn, those with NaN in them."""

    drawn: int
    kept: int
    nonfinite: int


def sample_seed(seed: int, prompt_id: str, index: int) -> int:
    """The seed of a sample's noise, which depends on nothing else: not on the model, the batch or the process."""
    return mix_seed(seed, int.from_bytes(prompt_id.encode(), "big"), index)


def sample_path(folder: Path, prompt_id: str, index: int, suffix: str) -> Path:
    """Where a sample lies."""
    return folder / prompt_id / f"{index:03d}{suffix}"


def draw_samples(
    model: BackboneAdapter | DiffusionPipeline,
    prompts: Sequence[PromptRecord],
    folder: str | Path,
    settings: SamplingSettings | None = None,
    *,
    batch_size: int = 1,
    name: str | None = None,
    keep_nonfinite: bool = False,
    show_progress: bool = True,
) -> DrawnSamples:
    """Draw what is missing of a folder of samples; every process of the run must call it, and takes its share.

    Two models given the same prompts and settings start from the same noise, sample by sample, whatever `batch_size`
    and the number of processes. The bytes of a file are those of an undisturbed run of one process with the same
    `batch_size`, on the same kind of machine; another batch size changes them by rounding.

    Args:
        model: It is used where it is, in the dtypes it has; a LoRA in it acts or not as it is set.
        prompts: Their names become those of folders.
        folder: A new one, or one that a run with the same arguments began.
        batch_size: Samples drawn at once.
        name: What the model is called, for the record.
        keep_nonfinite: Write samples with NaN or infinity in them, black where they are, and count them; else the
            first one is an error.

    Raises:
        ConfigurationError: A setting that the model does not take, names that cannot be those of folders, or a folder
            of other samples.
        NumericalError: A sample with NaN or infinity in it.
        StorageError: A file cannot be written.
    """
    adapter = model if isinstance(model, BackboneAdapter) else adapter_for(model)
    folder, settings = Path(folder), (settings or SamplingSettings()).resolved(adapter)
    _check_arguments(prompts, settings, batch_size)
    described = identity(adapter, prompts, dataclasses.asdict(settings), name)
    check_folder(folder, described)
    links = links_out_of(folder, [folder / record.prompt_id for record in prompts])
    if links:
        raise ConfigurationError(f"{str(links[0])!r} leads out of the folder of samples: it is a link. Remove it.")
    state = process_state()
    if state.is_main_process:
        write_folder(folder, described, prompts)
    state.wait_for_everyone()
    writer = _SampleWriter(folder, settings, keep_nonfinite)
    share = _batches(prompts, settings.samples_per_prompt, batch_size)[state.process_index :: state.num_processes]
    progress = tqdm(total=sum(map(len, share)), desc="Sampling", disable=not (show_progress and state.is_main_process))
    with _inference(adapter), progress:
        for batch in share:
            _draw_missing(adapter, batch, settings, writer)
            progress.update(len(batch))
    num_kept = sum(map(len, share)) - writer.num_written
    counts = gather_object([(writer.num_written, num_kept, writer.num_nonfinite)])  # waits for all processes
    done = DrawnSamples(*map(sum, zip(*counts, strict=True)))
    if done.nonfinite and state.is_main_process:
        logger.warning(
            f"{done.nonfinite} of {done.drawn} samples in {folder} have NaN or infinity in them: black there."
        )
    return done


def _draw_missing(
    adapter: BackboneAdapter,
    batch: Sequence[tuple[PromptRecord, int]],
    settings: SamplingSettings,
    writer: "_SampleWriter",
) -> None:
    """Write the samples of a batch that are missing. All of it are drawn, so that the bytes are always the same."""
    missing = [not writer.path(*sample).is_file() for sample in batch]
    if any(missing):
        drawn = zip(batch, missing, _draw(adapter, batch, settings), strict=True)
        writer.write([(*sample, pixels) for sample, is_missing, pixels in drawn if is_missing])


def _check_arguments(prompts: Sequence[PromptRecord], settings: SamplingSettings, batch_size: int) -> None:
    if not prompts:
        raise ConfigurationError("There are no prompts to draw samples for.")
    check_folder_names([record.prompt_id for record in prompts], "prompt")
    if batch_size < 1:
        raise ConfigurationError(f"`batch_size` must be at least 1, got {batch_size}.")
    if _suffix(settings.num_frames) == VIDEO_SUFFIX:
        check_video_writing()


def _suffix(num_frames: int | None) -> str:
    return IMAGE_SUFFIX if num_frames == 1 else VIDEO_SUFFIX


def _batches(
    prompts: Sequence[PromptRecord], samples_per_prompt: int, batch_size: int
) -> list[list[tuple[PromptRecord, int]]]:
    """All samples, prompt by prompt, in batches that do not depend on which of them are there."""
    samples = [(record, index) for record in prompts for index in range(samples_per_prompt)]
    return [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]


def _draw(adapter: BackboneAdapter, batch: Sequence[tuple[PromptRecord, int]], settings: SamplingSettings) -> Tensor:
    """Pixels (B, 3, [frames,] height, width) in [-1, 1]; noise is drawn on the CPU, so that devices agree on it."""
    generators = [
        torch.Generator().manual_seed(sample_seed(settings.seed, record.prompt_id, index)) for record, index in batch
    ]
    return adapter.sample_batch(
        [record.prompt for record, _ in batch],
        settings.height,
        settings.width,
        num_frames=settings.num_frames,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        frame_rate=settings.frame_rate,
        generators=generators,
    )


class _SampleWriter:
    """Writes samples where they belong, and counts them, and those that are not finite."""

    def __init__(self, folder: Path, settings: SamplingSettings, keep_nonfinite: bool):
        self.num_written = self.num_nonfinite = 0
        self._folder, self._settings, self._keep_nonfinite = folder, settings, keep_nonfinite

    def path(self, record: PromptRecord, index: int) -> Path:
        return sample_path(self._folder, record.prompt_id, index, _suffix(self._settings.num_frames))

    def write(self, samples: Sequence[tuple[PromptRecord, int, Tensor]]) -> None:
        """Write samples (prompt, index, pixels), up to the first that may not be written.

        Several at a time: what takes long is to wait until a file is on the disk.
        """
        finite = [bool(pixels.isfinite().all()) for _, _, pixels in samples]
        self.num_nonfinite += finite.count(False)
        allowed = len(samples) if self._keep_nonfinite or all(finite) else finite.index(False)
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for _ in pool.map(self._write_one, samples[:allowed]):
                self.num_written += 1
        if allowed < len(samples):
            record, index, _ = samples[allowed]
            raise NumericalError(
                f"Sample {index} of the prompt {record.prompt_id!r} has NaN or infinity in it, and would be black. "
                "Often float16 overflows: load the model in float32 or bfloat16. With `keep_nonfinite` such samples "
                "are written and counted. What was drawn before is kept."
            )

    def _write_one(self, sample: tuple[PromptRecord, int, Tensor]) -> None:
        record, index, pixels = sample
        path = self.path(record, index)
        if path.suffix == VIDEO_SUFFIX:
            write_video(path, pixels, self._settings.frame_rate)
        else:
            write_image(path, pixels[:, 0] if pixels.ndim == 4 else pixels)


@contextmanager
def _inference(adapter: BackboneAdapter) -> Iterator[None]:
    """Modules in eval mode, no gradients, no progress bar of the pipeline's own; all as before afterwards."""
    pipeline = adapter.pipeline
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    training = [part for module in modules for part in module.modules() if part.training]
    progress = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
        pipeline.set_progress_bar_config(**{"disable": False, **progress})


def read_samples(folder: str | Path) -> Iterator[Sample]:
    """All samples of a folder, prompt by prompt.

    Raises:
        DatasetError: It is no folder of samples, or some are missing.
    """
    folder = Path(folder)
    settings, prompts = _read_folder(folder)
    suffix = _suffix(settings.num_frames)
    samples = [
        Sample(record, index, sample_path(folder, record.prompt_id, index, suffix))
        for record in prompts
        for index in range(settings.samples_per_prompt)
    ]
    missing = [sample.path for sample in samples if not sample.path.is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(samples)} samples are missing in {str(folder)!r}, such as {missing[0].name} of "
            f"{missing[0].parent.name}. Run what draws them again: it goes on where it was."
        )
    links = links_out_of(folder, [sample.path for sample in samples])
    if links:
        raise DatasetError(f"The sample {str(links[0])!r} leads out of the folder: it is a link. Put the file there.")
    return iter(samples)


def _read_folder(folder: Path) -> tuple[SamplingSettings, list[PromptRecord]]:
    """What a folder says of itself, if it can be so: the names in it lead nowhere else."""
    settings, prompts = read_settings(folder).get("settings"), read_prompts(folder)
    try:
        check_folder_names([record.prompt_id for record in prompts], "prompt")
        return SamplingSettings(**settings), prompts
    except (ConfigurationError, TypeError) as error:
        raise DatasetError(
            f"{str(folder)!r} is no folder of samples that draw_samples has written: {error}"
        ) from error
