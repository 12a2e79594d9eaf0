# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit weights`: the importance weights of a model on some pairs, and which noise levels they mask.

Forward passes only, on the model's own noise schedule and the grid of its sampler.
"""

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError
from trl_sipo.printing import ArgumentParser, words_without_secrets

if TYPE_CHECKING:
    from trl_sipo.adapters.base import BackboneAdapter
    from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
    from trl_sipo.data.preference_dataset import PreferenceDataset
    from trl_sipo.evaluation.importance_curve import PairWeights
    from trl_sipo.trainer.diffusion_sipo_config import DiffusionSIPOConfig
    from trl_sipo.trainer.encoding import EncodedPairs

DTYPES = ("float32", "bfloat16", "float16")


def make_parser(prog: str = "trl-sipo audit weights") -> argparse.ArgumentParser:
    """The options; those that a training command has too have its names and defaults."""
    parser = ArgumentParser(
        prog=prog,
        description="Print the importance weight at every noise level, and the region that SIPO would mask.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="PATH", help="hub id or local path of a diffusers pipeline")
    add("--lora", metavar="PATH", help="a LoRA to load on top, to look at a model in training")
    add("--dtype", choices=DTYPES, default="float32", help="precision of all but the VAE (default: %(default)s)")
    add("--dataset_name", required=True, metavar="PATH", help="hub id or local path of preference pairs")
    add("--dataset_config", metavar="NAME", help="configuration of a hub dataset")
    add("--dataset_split", default="train", help="default: %(default)s")
    add("--dataset_format", metavar="NAME", help="layout of the data (default: recognised by its columns)")
    add("--dataset_media_folder", metavar="DIR", help="folder to which paths are relative (default: their table's)")
    add("--num_pairs", type=int, default=8, help="evenly spaced over the split (default: %(default)s)")
    add("--num_levels", type=int, default=50, help="evenly spaced over the drawn times (default: %(default)s)")
    add("--resolution", type=int, nargs="+", metavar="PIXELS", help="height and width; one number for a square")
    add("--num_frames", type=int, default=1, help="frames of video clips; 1 takes images (default: %(default)s)")
    add("--frame_rate", type=float, help="frames per second of the clips (default: each video's own)")
    part = {"nargs": 2, "metavar": ("LOW", "HIGH"), "default": [0.0, 1.0]}
    add("--timestep_range", type=float, **part, help="part of the schedule to look at, such as that of one expert")
    add("--timestep_shift", type=float, help="shift of the drawn levels of a flow model (default: its sampler's)")
    add("--importance_steps", type=int, default=50, help="steps of the sampler grid (default: %(default)s)")
    add("--clip_range", type=float, default=0.1, help="default: %(default)s")
    add("--mask_threshold", type=float, help="weight below which a level is masked (default: 1 - clip_range)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--output", type=Path, metavar="DIR", help="folder for weights.json and weights.png")
    return parser


def training_settings(arguments: argparse.Namespace) -> "DiffusionSIPOConfig":
    """The settings under which SIPO would train, with all their checks.

    Raises:
        ConfigurationError: One that is out of range, or figures that could not be drawn.
    """
    import torch

    from trl_sipo.reporting.figures import check_plotting
    from trl_sipo.trainer.diffusion_sipo_config import DiffusionSIPOConfig

    for name, least in (("num_pairs", 1), ("num_levels", 2)):
        if getattr(arguments, name) < least:
            raise ConfigurationError(f"`{name}` must be at least {least}, got {getattr(arguments, name)}.")
    if arguments.output is not None:
        check_plotting()
    shared = (
        "resolution", "num_frames", "frame_rate", "timestep_shift", "importance_steps", "clip_range",
        "mask_threshold", "seed", "timestep_range",
    )  # fmt: skip
    given = {name: getattr(arguments, name) for name in shared}
    # Nothing is trained, nor written there.
    return DiffusionSIPOConfig("audit", **given, bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none")


# ---------------------------------------------------------------------------------------------------- model and data


def load_adapter(arguments: argparse.Namespace) -> "BackboneAdapter":
    """The pipeline, with its LoRA if one is given, on the GPU if there is one.

    Raises:
        BackboneError: The pipeline or the LoRA cannot be loaded.
    """
    import torch

    from trl_sipo.adapters import adapter_for, load_pipeline
    from trl_sipo.generation.models import apply_lora

    # As in training: several VAEs overflow in float16.
    dtypes = {"default": getattr(torch, arguments.dtype), "vae": torch.float32}
    pipeline: Any = load_pipeline(arguments.model_name_or_path, dtype=dtypes)
    if arguments.lora is not None:
        apply_lora(pipeline, arguments.lora)
    adapter = adapter_for(pipeline.to("cuda" if torch.cuda.is_available() else "cpu"))
    adapter.freeze()
    adapter.denoiser.requires_grad_(False)
    return adapter


def load_pairs(
    arguments: argparse.Namespace, adapter: "BackboneAdapter", settings: "DiffusionSIPOConfig", size: tuple[int, int]
) -> "PreferenceDataset":
    """The pairs as a training run evaluates them: centre-cropped, clips from their beginning.

    Raises:
        DatasetError: No such data, latents of another model, or too few pairs.
    """
    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.trainer.preference_data import as_tensors

    split = arguments.dataset_split
    rows = load_preference_dataset(
        arguments.dataset_name,
        name=arguments.dataset_config,
        split=split,
        format=arguments.dataset_format,
        media_folder=arguments.dataset_media_folder,
    )
    pairs = as_tensors(rows, adapter, settings, size, split)
    if len(pairs) < arguments.num_pairs:
        raise DatasetError(
            f"`num_pairs={arguments.num_pairs}`, but the split {split!r} has {len(pairs)} pairs with a preference: "
            "lower it, or give another split."
        )
    return pairs


# ------------------------------------------------------------------------------------------------------- measurement


def encode_pairs(
    adapter: "BackboneAdapter", pairs: "PreferenceDataset", num_pairs: int
) -> list[tuple[int, "EncodedPairs"]]:
    """Evenly spaced pairs, each with its index, in batches of one.

    Raises:
        DatasetError: Pairs of several sizes.
    """
    from trl_sipo.data.collator import DataCollatorForDiffusionPreference
    from trl_sipo.trainer.encoding import PairEncoder

    collate, device = DataCollatorForDiffusionPreference(), adapter.pipeline.device
    encode = PairEncoder(adapter, sample_posterior=False, caption_dropout=0.0)
    chosen = [i * len(pairs) // num_pairs for i in range(num_pairs)]
    encoded = [(i, encode(collate([pairs[i]]), device, [], training=False)) for i in chosen]
    shapes = {tuple(part.chosen_latents.shape[1:]) for _, part in encoded}
    if len(shapes) > 1:
        raise DatasetError(f"The pairs have latents of several shapes, {sorted(shapes)}; give a split of one size.")
    return encoded


def measure(
    adapter: "BackboneAdapter",
    encoded: list[tuple[int, "EncodedPairs"]],
    levels: "NoiseLevel",
    schedule: "VPSchedule | FlowSchedule",
    settings: "DiffusionSIPOConfig",
) -> "PairWeights":
    """Both arms of every pair at every level, one pair at a time.

    Raises:
        NumericalError: An error that is not finite.
    """
    from tqdm.auto import tqdm

    from trl_sipo.data.seeding import seeded_generator
    from trl_sipo.evaluation.importance_curve import PairWeights, pair_weights
    from trl_sipo.trainer.encoding import draw_noise

    parts = []
    with tqdm(total=len(encoded) * len(levels.timestep), desc="Forward passes") as progress:
        for index, pair in encoded:
            noise = draw_noise(pair.chosen_latents, [seeded_generator(settings.seed, index)])
            options = {"schedule": schedule, "num_steps": settings.importance_steps, "on_level": progress.update}
            parts.append(pair_weights(adapter, adapter.denoiser, pair, noise, levels, **options))
            check_finite(parts[-1], levels, schedule, index)
    return PairWeights.join(parts)


def check_finite(
    weights: "PairWeights", levels: "NoiseLevel", schedule: "VPSchedule | FlowSchedule", index: int
) -> None:
    """Raise [`NumericalError`] where the error of a pair is none: no weight follows from it, masked or not."""
    from trl_sipo.core.noise_schedule import FlowSchedule

    is_finite = (weights.chosen_error.isfinite() & weights.rejected_error.isfinite()).all(dim=1)
    if is_finite.all():
        return
    position = int((~is_finite).nonzero()[0])
    if isinstance(schedule, FlowSchedule):
        level = f"sigma {float(levels.sigma_t[position]):.4f}"
    else:
        level = f"timestep {int(levels.timestep[position])}"
    raise NumericalError(
        f"The model's error is not finite for pair {index} at {level} ({int((~is_finite).sum())} of {len(is_finite)} "
        "levels), so that no weight follows. Either the weights or the pair hold such values, or the computation "
        "overflows, which `--dtype float32` avoids."
    )


# ------------------------------------------------------------------------------------------------------------ report


def level_rows(
    times: list[float], levels: "NoiseLevel", weights: "PairWeights", mask_threshold: float
) -> list[dict[str, Any]]:
    """One row of numbers per level; means over the pairs."""
    from trl_sipo.core.importance import timestep_mask

    columns = {
        "time": times,
        "timestep": levels.timestep.tolist(),
        "sigma": levels.sigma_t.tolist(),
        # JSON has no infinity: zero terminal SNR and the clean end have no logarithm there.
        "log_snr": [value if math.isfinite(value) else None for value in levels.log_snr.tolist()],
        "chosen_error": weights.chosen_error.mean(1).tolist(),
        "rejected_error": weights.rejected_error.mean(1).tolist(),
        "chosen_weight": weights.chosen.exp().mean(1).tolist(),
        "rejected_weight": weights.rejected.exp().mean(1).tolist(),
        "pair_weight": weights.pair.exp().mean(1).tolist(),
        "median_pair_weight": weights.pair.exp().quantile(0.5, dim=1).tolist(),
        "masked_share": (~timestep_mask(weights.pair, mask_threshold)).float().mean(1).tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def table(rows: list[dict[str, Any]], level_name: str) -> str:
    """The rows as text."""
    heads = ("time", level_name, "log-SNR", "error", "w(chosen)", "w(rejected)", "w(pair)", "masked")
    lines = [" ".join(f"{head:>11}" for head in heads)]
    for row in rows:
        level = f"{row['timestep']:>11d}" if level_name == "timestep" else f"{row['sigma']:>11.4f}"
        log_snr = "    infinite" if row["log_snr"] is None else f"{row['log_snr']:>11.2f}"
        error = (row["chosen_error"] + row["rejected_error"]) / 2
        weights = " ".join(f"{row[name]:>11.4f}" for name in ("chosen_weight", "rejected_weight", "pair_weight"))
        lines.append(f"{row['time']:>11.3f} {level} {log_snr} {error:>11.4f} {weights} {row['masked_share']:>10.0%} ")
    return "\n".join(lines)


def find_regions(
    rows: list[dict[str, Any]],
    schedule: "VPSchedule | FlowSchedule",
    level_name: str,
    mask_threshold: float,
    within: tuple[float, float] = (0.0, 1.0),
) -> list[dict[str, Any]]:
    """Where half of the pairs or more are masked: ends in time and in the schedule's own unit, and in words."""
    import torch

    from trl_sipo.evaluation.importance_curve import masked_regions

    curve = [row["median_pair_weight"] for row in rows]
    regions = []
    for start, end in masked_regions([row["time"] for row in rows], curve, mask_threshold, within=within):
        ends = schedule.level_at(torch.tensor([start, end], dtype=torch.float64))
        low, high = (ends.timestep if level_name == "timestep" else ends.sigma_t).tolist()
        shown = [f"{value:.0f}" if level_name == "timestep" else f"{value:.2f}" for value in (low, high)]
        if start == 0 and end == 1:
            words = f"every {level_name}"
        elif start == 0:
            words = f"{level_name} <= {shown[1]}"
        elif end == 1:
            words = f"{level_name} >= {shown[0]}"
        else:
            words = f"{shown[0]} <= {level_name} <= {shown[1]}"
        regions.append({"time": [start, end], level_name: [low, high], "words": words})
    return regions


def describe(
    regions: list[dict[str, Any]], masked_share: float, num_levels: int, within: tuple[float, float] = (0.0, 1.0)
) -> list[str]:
    """What is masked of the levels `within` these times, in plain words, and what that suggests."""
    length = within[1] - within[0]
    if not regions:
        masked = "Masked: no level for half of the pairs or more."
    else:
        share = sum(region["time"][1] - region["time"][0] for region in regions) / length
        where = " and ".join(region["words"] for region in regions)
        known = f"{length / num_levels:.2g}"
        masked = f"Masked: {where}, i.e. {share:.1%} of uniformly drawn times (ends known to {known} in time)."
    expected = f"Of single pairs at single levels, {masked_share:.1%} are masked: about where `sipo/masked_fraction` "
    return [masked, expected + "should start with uniform `timestep_sampling`.", suggestion(regions, masked_share)]


def suggestion(regions: list[dict[str, Any]], masked_share: float) -> str:
    """What the masked region means for a run."""
    if masked_share == 0:
        return "SIPO would start as Diffusion-DPO does; its mask acts only once the policy's error has grown."
    if masked_share > 0.9:
        return (
            "Next to nothing is left to train on: the grid is too coarse for this model, or the data is unlike what "
            "it knows. Raise `importance_steps`, or lower `mask_threshold`."
        )
    if [region["time"][0] for region in regions] in ([], [0.0]):
        return (
            "Only the clean end is cut, as in Fig. 4 of the SIPO paper. As the policy moves away from the data its "
            "error grows, and so does this region."
        )
    return (
        "Levels beyond the clean end are cut as well, unlike in the SIPO paper: there the model's error is large "
        "for a step of this grid. See whether they stay with more `importance_steps`."
    )


def write_report(folder: Path, report: dict[str, Any], level_name: str) -> None:
    """`weights.json` and `weights.png` in a folder that is made if need be."""
    from trl_sipo.reporting.figures import importance_weight_figure

    names = {"chosen": "chosen_weight", "rejected": "rejected_weight", "pair": "pair_weight"}
    curves = {label: [row[name] for row in report["levels"]] for label, name in names.items()}
    figure = importance_weight_figure(
        [row[level_name] for row in report["levels"]],
        curves,
        report["settings"]["mask_threshold"],
        title="Importance weight of preference pairs",
        level_label=f"{level_name} (0 is clean)",
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    figure.savefig(folder / "weights.png", dpi=130)


def schedule_words(schedule: "VPSchedule | FlowSchedule") -> str:
    """The noise process, for the report."""
    from trl_sipo.core.noise_schedule import FlowSchedule

    if not isinstance(schedule, FlowSchedule):
        return f"diffusion over {schedule.num_train_timesteps} timesteps"
    return f"rectified flow, shift {schedule.shift:.4g} (of the times that are drawn: {schedule.drawn_shift:.4g})"


def settings_words(
    *, pipeline: str, prediction_type: str, schedule: str, importance_steps: int, mask_threshold: float, height: int,
    width: int, num_frames: int, num_pairs: int, dataset_split: str, seed: int, timestep_range: list[float],
) -> str:  # fmt: skip
    """What the numbers depend on, in one sentence."""
    frames = f", {num_frames} frames" if num_frames > 1 else ""
    low, high = timestep_range
    times = "" if (low, high) == (0, 1) else f"times from {low:.4g} to {high:.4g} of the schedule; "
    return (
        f"Settings: {pipeline}, {prediction_type}, {schedule}; {times}neighbours on a grid of {importance_steps} "
        f"steps; {width}x{height}{frames}; {num_pairs} pairs of {dataset_split!r}, noise of seed {seed}; masked below "
        f"w = {mask_threshold:.4g}."
    )


def run(command: str, argv: list[str]) -> None:
    """Measure, print, and write when asked to."""
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    settings = training_settings(arguments)
    from trl_sipo.core.noise_schedule import FlowSchedule
    from trl_sipo.evaluation.importance_curve import stratum_midpoints
    from trl_sipo.trainer.noise_levels import training_schedule

    adapter = load_adapter(arguments)
    size = settings.size or adapter.default_size
    adapter.validate_size(*size, settings.num_frames)
    schedule = training_schedule(adapter, settings, size)
    low, high = settings.timestep_range
    times = low + (high - low) * stratum_midpoints(arguments.num_levels)
    levels = schedule.level_at(times)
    encoded = encode_pairs(adapter, load_pairs(arguments, adapter, settings, size), arguments.num_pairs)
    weights = measure(adapter, encoded, levels, schedule, settings)

    level_name = "sigma" if isinstance(schedule, FlowSchedule) else "timestep"
    threshold = 1 - settings.clip_range if settings.mask_threshold is None else settings.mask_threshold
    rows = level_rows(times.tolist(), levels, weights, threshold)
    regions = find_regions(rows, schedule, level_name, threshold, (low, high))
    masked_share = sum(row["masked_share"] for row in rows) / len(rows)
    report = {
        "command": shlex.join(words_without_secrets(["trl-sipo", *command.split(), *argv])),
        "settings": {
            "pipeline": type(adapter.pipeline).__name__,
            "prediction_type": adapter.prediction_type,
            "schedule": schedule_words(schedule),
            "timestep_range": settings.timestep_range,
            "importance_steps": settings.importance_steps,
            "mask_threshold": threshold,
            "height": size[0],
            "width": size[1],
            "num_frames": settings.num_frames,
            "num_pairs": arguments.num_pairs,
            "dataset_split": arguments.dataset_split,
            "seed": settings.seed,
        },
        "masked_share": masked_share,
        "masked_regions": regions,
        "reading": describe(regions, masked_share, arguments.num_levels, (low, high)),
        "levels": rows,
    }
    print(table(rows, level_name), "", *report["reading"], "", settings_words(**report["settings"]), sep="\n")
    if arguments.output is not None:
        write_report(arguments.output, report, level_name)
        print(f"Numbers and figure are in {arguments.output}.")
