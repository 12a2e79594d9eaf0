# SPDX-License-Identifier: Apache-2.0
"""What the audits that look at a model share: its options, the model, the pairs, and its errors on them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError

if TYPE_CHECKING:
    from torch import Tensor

    from trl_sipo.adapters.base import BackboneAdapter
    from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
    from trl_sipo.data.cache.dataset import CachedPairs
    from trl_sipo.evaluation.importance_curve import PairWeights
    from trl_sipo.trainer.diffusion_sipo_config import DiffusionSIPOConfig
    from trl_sipo.trainer.encoding import EncodedPairs

DTYPES = ("float32", "bfloat16", "float16")
SOURCE_COLUMN = "source"
_LONGEST_SOURCE = 60  # characters of a value of the source column that are shown

# ----------------------------------------------------------------------------------------------------------- options


def add_model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which model; those that a training command has too have its names."""
    add = parser.add_argument
    add("--model_name_or_path", required=required, metavar="PATH", help="hub id or local path of a diffusers pipeline")
    add("--lora", metavar="PATH", help="a LoRA to load on top, to look at a model in training")
    add("--dtype", choices=DTYPES, default="float32", help="precision of all but the VAE (default: %(default)s)")


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """A second state of the model, measured beside the first."""
    parser.add_argument(
        "--adapter",
        metavar="PATH",
        help="a LoRA, or the pipeline of a run that trained all weights, measured beside the model",
    )


def add_data_options(parser: argparse.ArgumentParser, *, num_pairs: int) -> None:
    """Which pairs, and at which size; those that a training command has too have its names."""
    add = parser.add_argument
    add("--dataset_name", required=True, metavar="PATH", help="hub id or local path of preference pairs, or a cache")
    add("--dataset_config", metavar="NAME", help="configuration of a hub dataset")
    add("--dataset_split", default="train", help="default: %(default)s")
    add("--dataset_format", metavar="NAME", help="layout of the data (default: recognised by its columns)")
    add("--dataset_media_folder", metavar="DIR", help="folder to which paths are relative (default: their table's)")
    add("--num_pairs", type=int, default=num_pairs, help="evenly spaced over the split (default: %(default)s)")
    add("--resolution", type=int, nargs="+", metavar="PIXELS", help="height and width; one number for a square")
    add("--num_frames", type=int, help="frames of video clips; 1 takes images (default: 1, or those of a cache)")
    add("--frame_rate", type=float, help="frames per second of the clips (default: each video's own)")


def add_level_options(parser: argparse.ArgumentParser, *, num_levels: int) -> None:
    """At which noise levels; those that a training command has too have its names."""
    add = parser.add_argument
    add("--num_levels", type=int, default=num_levels, help="evenly spaced over the drawn times (default: %(default)s)")
    part = {"nargs": 2, "metavar": ("LOW", "HIGH"), "default": [0.0, 1.0]}
    add("--timestep_range", type=float, **part, help="part of the schedule to look at, such as that of one expert")
    add("--timestep_shift", type=float, help="shift of the drawn levels of a flow model (default: its sampler's)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """What the importance weight, and the mask, depend on."""
    add = parser.add_argument
    add("--importance_steps", type=int, default=50, help="steps of the sampler grid (default: %(default)s)")
    add("--clip_range", type=float, default=0.1, help="default: %(default)s")
    add("--mask_threshold", type=float, help="weight below which a level is masked (default: 1 - clip_range)")


def training_settings(arguments: argparse.Namespace, rows: Any = None) -> "DiffusionSIPOConfig":
    """The settings under which SIPO would train, with all their checks.

    Args:
        arguments: Of the options above; those of an audit without some of them take training's defaults.
        rows: The data; a cache says itself at which size it was encoded.

    Raises:
        ConfigurationError: One that is out of range, or contradicts the cache.
    """
    import torch

    from trl_sipo.data.cache.dataset import CachedPairs
    from trl_sipo.trainer.cached_data import check_cache
    from trl_sipo.trainer.diffusion_sipo_config import DiffusionSIPOConfig

    for name, least in (("num_pairs", 1), ("num_levels", 2)):
        if getattr(arguments, name) < least:
            raise ConfigurationError(f"`{name}` must be at least {least}, got {getattr(arguments, name)}.")
    shared = (
        "resolution", "num_frames", "frame_rate", "timestep_shift", "importance_steps", "clip_range",
        "mask_threshold", "seed", "timestep_range",
    )  # fmt: skip
    given = {name: getattr(arguments, name, None) for name in shared}
    known = {**(_of_cache(rows) if isinstance(rows, CachedPairs) else {})}
    known |= {name: value for name, value in given.items() if value is not None}
    # Nothing is trained, nor written there.
    settings = DiffusionSIPOConfig(
        "audit", **known, bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none"
    )
    if isinstance(rows, CachedPairs):
        check_cache(rows, settings, arguments.dataset_split)
    return settings


def _of_cache(rows: "CachedPairs") -> dict[str, Any]:
    manifest = rows.manifest
    clip = {"num_frames": manifest.num_frames} if manifest.num_frames > 1 else {}
    return {"resolution": list(manifest.size), "soft_labels": manifest.soft_labels, **clip}


# ---------------------------------------------------------------------------------------------------- model and data


def load_adapter(arguments: argparse.Namespace) -> "BackboneAdapter":
    """The pipeline, with its LoRA if one is given, on the GPU if there is one.

    Raises:
        BackboneError: The pipeline or the LoRA cannot be loaded.
    """
    from trl_sipo.generation.models import ModelSpec, load_model

    return load_model(ModelSpec("model", arguments.model_name_or_path, arguments.lora), dtype=arguments.dtype)


def check_adapter(arguments: argparse.Namespace) -> None:
    """Look whether `--adapter` is there, before the model is measured without it.

    Raises:
        BackboneError: It is not.
        ConfigurationError: A LoRA beside another one.
    """
    from trl_sipo.generation.models import check_lora

    if arguments.adapter is None or _is_pipeline(arguments.adapter):
        return
    if arguments.lora is not None:
        raise ConfigurationError(
            f"`--lora {arguments.lora}` with `--adapter {arguments.adapter}`: the two would act together. Measure one "
            "at a time."
        )
    check_lora(arguments.adapter)


def with_adapter(arguments: argparse.Namespace, adapter: "BackboneAdapter") -> "BackboneAdapter":
    """The second state: the same model with a LoRA put on it, or the pipeline that took its place.

    Raises:
        BackboneError: It does not load.
        ConfigurationError: It is another kind of model.
    """
    from trl_sipo.adapters import adapter_for
    from trl_sipo.generation.models import ModelSpec, apply_lora, load_model

    if _is_pipeline(arguments.adapter):
        second = load_model(ModelSpec("adapter", arguments.adapter), dtype=arguments.dtype)
        kinds = [f"{each.pipeline_class_name}, {each.prediction_type}" for each in (adapter, second)]
        if kinds[0] != kinds[1]:
            raise ConfigurationError(
                f"`--adapter {arguments.adapter}` is a {kinds[1]}, and the model a {kinds[0]}: one was not tuned from "
                "the other, and their errors do not compare."
            )
        return second
    apply_lora(adapter.pipeline, arguments.adapter)
    second = adapter_for(adapter.pipeline.to(adapter.pipeline.device))
    second.freeze()
    second.denoiser.requires_grad_(False)
    return second


def load_rows(arguments: argparse.Namespace) -> Any:
    """The data as it is stored: a `datasets.Dataset`, or a cache.

    Raises:
        DatasetError: There is none, or not this split.
    """
    from trl_sipo.data.loading import load_preference_dataset

    return load_preference_dataset(
        arguments.dataset_name,
        name=arguments.dataset_config,
        split=arguments.dataset_split,
        format=arguments.dataset_format,
        media_folder=arguments.dataset_media_folder,
    )


@dataclass(frozen=True)
class AuditedPair:
    """One pair that is looked at.

    Attributes:
        index: Among the pairs of the split.
        prompt: Judgements on one prompt are not taken for independent.
        source: Where it comes from, by a column of the data; None: it does not say.
        encoded: A batch of one.
    """

    index: int
    prompt: str
    source: str | None
    encoded: "EncodedPairs"


def encode_pairs(
    arguments: argparse.Namespace,
    adapter: "BackboneAdapter",
    rows: Any,
    settings: "DiffusionSIPOConfig",
    size: tuple[int, int],
    *,
    at_most: bool = False,
) -> list[AuditedPair]:
    """Evenly spaced pairs as a training run evaluates them: centre-cropped, clips from their beginning.

    Args:
        rows: As [`load_rows`] gives them.
        at_most: Take fewer than `--num_pairs` where there are fewer.

    Raises:
        DatasetError: Latents of another model, too few pairs, or pairs of several sizes.
        ConfigurationError: A column of sources that is not there.
    """
    from tqdm.auto import tqdm

    from trl_sipo.data.collator import DataCollatorForDiffusionPreference
    from trl_sipo.trainer.encoding import PairEncoder
    from trl_sipo.trainer.preference_data import as_tensors

    split, num_pairs = arguments.dataset_split, arguments.num_pairs
    pairs = as_tensors(rows, adapter, settings, size, split)
    if at_most:
        num_pairs = min(num_pairs, len(pairs))
    if len(pairs) < max(num_pairs, 1):
        raise DatasetError(
            f"`num_pairs={arguments.num_pairs}`, but the split {split!r} has {len(pairs)} pairs with a preference: "
            "lower it, or give another split."
        )
    source_of = source_reader(rows, pairs, getattr(arguments, "source_column", None))
    collate, device = DataCollatorForDiffusionPreference(), adapter.pipeline.device
    encode = PairEncoder(adapter, sample_posterior=False, caption_dropout=0.0)
    found = []
    for index in tqdm([i * len(pairs) // num_pairs for i in range(num_pairs)], desc="Encoding pairs"):
        inputs = collate([pairs[index]])
        encoded = encode(inputs, device, [], training=False)
        found.append(AuditedPair(index, inputs["prompt"][0], source_of(index), encoded))
    shapes = {tuple(latents.shape[1:]) for pair in found for latents in pair.encoded.arms}
    if len(shapes) > 1:
        raise DatasetError(f"The pairs have latents of several shapes, {sorted(shapes)}; give a split of one size.")
    return found


def source_reader(rows: Any, pairs: Any, column: str | None) -> Any:
    """A function from a pair's index to the value of its source column, as text; None where there is no such column.

    Raises:
        ConfigurationError: The column that was asked for is not there.
    """
    names = getattr(rows, "column_names", [])
    if column is not None and column not in names:
        there = f"it has {', '.join(names)}" if names else "a cache keeps none: give the data that it was made of"
        raise ConfigurationError(f"`--source_column {column}`: the data has no such column; {there}.")
    chosen = column or SOURCE_COLUMN
    if chosen not in names:
        return lambda index: None
    values = rows.select_columns([chosen])
    return lambda index: str(values[pairs.row_number(index)][chosen])[:_LONGEST_SOURCE]


def _is_pipeline(path: str) -> bool:
    return (Path(path).expanduser() / "model_index.json").is_file()


# ------------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class AuditedLevels:
    """The noise levels that are looked at.

    Attributes:
        schedule: Of the model at this size.
        times: (levels,) float64; 0 is clean, 1 pure noise.
        levels: The same as noise levels.
        within: The part of the schedule that is looked at.
    """

    schedule: "VPSchedule | FlowSchedule"
    times: "Tensor"
    levels: "NoiseLevel"
    within: tuple[float, float]

    @property
    def unit(self) -> str:
        """What levels are counted in: "timestep" or "sigma"."""
        from trl_sipo.core.noise_schedule import FlowSchedule

        return "sigma" if isinstance(self.schedule, FlowSchedule) else "timestep"

    @property
    def positions(self) -> list[float]:
        """The levels in that unit."""
        return (self.levels.timestep if self.unit == "timestep" else self.levels.sigma_t).tolist()

    def shown(self, place: int) -> str:
        """A level as text."""
        value = self.positions[place]
        return f"{value:d}" if self.unit == "timestep" else f"{value:.4f}"


def audited_levels(
    arguments: argparse.Namespace,
    adapter: "BackboneAdapter",
    settings: "DiffusionSIPOConfig",
    size: tuple[int, int],
) -> AuditedLevels:
    """Levels evenly spaced over the drawn times, in the middle of equal strata."""
    from trl_sipo.evaluation.importance_curve import stratum_midpoints
    from trl_sipo.trainer.noise_levels import training_schedule

    schedule = training_schedule(adapter, settings, size)
    low, high = settings.timestep_range
    times = low + (high - low) * stratum_midpoints(arguments.num_levels)
    return AuditedLevels(schedule, times, schedule.level_at(times), (low, high))


class Opened(NamedTuple):
    """What a model is measured on, and under which settings; `size` is height and width in pixels."""

    settings: "DiffusionSIPOConfig"
    size: tuple[int, int]
    audited: AuditedLevels
    pairs: list[AuditedPair]


def open_pairs(
    arguments: argparse.Namespace, adapter: "BackboneAdapter", rows: Any, *, at_most: bool = False
) -> Opened:
    """The settings that fit model and data, the levels, and the pairs, encoded.

    Args:
        rows, at_most: Of [`encode_pairs`].

    Raises:
        ConfigurationError: Settings that contradict the data or the model.
        DatasetError: Of [`encode_pairs`].
    """
    settings = training_settings(arguments, rows)
    size = settings.size or adapter.default_size
    adapter.validate_size(*size, settings.num_frames)
    audited = audited_levels(arguments, adapter, settings, size)
    return Opened(settings, size, audited, encode_pairs(arguments, adapter, rows, settings, size, at_most=at_most))


def measure(
    adapter: "BackboneAdapter",
    pairs: Sequence[AuditedPair],
    audited: AuditedLevels,
    settings: "DiffusionSIPOConfig",
    *,
    what: str = "Forward passes",
) -> "PairWeights":
    """Errors and weights of both arms of every pair at every level, one pair at a time.

    The noise of a pair depends on `--seed` and its index alone: two states of a model see the same.

    Args:
        what: Beside the progress bar.

    Raises:
        NumericalError: An error that is not finite.
    """
    from tqdm.auto import tqdm

    from trl_sipo.evaluation.importance_curve import PairWeights, pair_weights

    parts = []
    with tqdm(total=len(pairs) * len(audited.times), desc=what) as progress:
        for pair in pairs:
            noise = noise_of(pair, settings)
            options = {"schedule": audited.schedule, "num_steps": settings.importance_steps}
            options["on_level"] = progress.update
            parts.append(pair_weights(adapter, adapter.denoiser, pair.encoded, noise, audited.levels, **options))
            check_finite(parts[-1], audited, pair.index)
    return PairWeights.join(parts)


def noise_of(pair: AuditedPair, settings: "DiffusionSIPOConfig") -> "Tensor":
    """The noise of a pair, shared by its arms and by all levels, (1, ...) float32."""
    from trl_sipo.data.seeding import seeded_generator
    from trl_sipo.trainer.encoding import draw_noise

    return draw_noise(pair.encoded.chosen_latents, [seeded_generator(settings.seed, pair.index)])


def check_finite(weights: "PairWeights", audited: AuditedLevels, index: int) -> None:
    """Raise [`NumericalError`] where the error of a pair is none: nothing follows from it, masked or not."""
    is_finite = (weights.chosen_error.isfinite() & weights.rejected_error.isfinite()).all(dim=1)
    if is_finite.all():
        return
    level = f"{audited.unit} {audited.shown(int((~is_finite).nonzero()[0]))}"
    raise NumericalError(
        f"The model's error is not finite for pair {index} at {level} ({int((~is_finite).sum())} of {len(is_finite)} "
        "levels), so that no weight follows. Either the weights or the pair hold such values, or the computation "
        "overflows, which `--dtype float32` avoids."
    )


def schedule_words(schedule: "VPSchedule | FlowSchedule") -> str:
    """The noise process, for the report."""
    from trl_sipo.core.noise_schedule import FlowSchedule

    if not isinstance(schedule, FlowSchedule):
        return f"diffusion over {schedule.num_train_timesteps} timesteps"
    return f"rectified flow, shift {schedule.shift:.4g} (of the times that are drawn: {schedule.drawn_shift:.4g})"


def settings_of(
    arguments: argparse.Namespace,
    adapter: "BackboneAdapter",
    settings: "DiffusionSIPOConfig",
    audited: AuditedLevels,
    size: tuple[int, int],
    num_pairs: int,
) -> dict[str, Any]:
    """What the numbers depend on, for the report."""
    return {
        "pipeline": type(adapter.pipeline).__name__,
        "prediction_type": adapter.prediction_type,
        "schedule": schedule_words(audited.schedule),
        "timestep_range": list(audited.within),
        "height": size[0],
        "width": size[1],
        "num_frames": settings.num_frames,
        "num_pairs": num_pairs,
        "num_levels": arguments.num_levels,
        "dataset_split": arguments.dataset_split,
        "seed": settings.seed,
    }


def settings_words(settings: dict[str, Any]) -> str:
    """The same in one sentence, without the full stop."""
    frames = f", {settings['num_frames']} frames" if settings["num_frames"] > 1 else ""
    low, high = settings["timestep_range"]
    times = "" if (low, high) == (0, 1) else f"times from {low:.4g} to {high:.4g} of the schedule; "
    return (
        f"Settings: {settings['pipeline']}, {settings['prediction_type']}, {settings['schedule']}; {times}"
        f"{settings['width']}x{settings['height']}{frames}; {settings['num_pairs']} pairs of "
        f"{settings['dataset_split']!r}, noise of seed {settings['seed']}"
    )
