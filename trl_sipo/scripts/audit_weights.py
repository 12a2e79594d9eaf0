# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit weights`: the importance weights of a model on some pairs, and which noise levels they mask.

Forward passes only, on the model's own noise schedule and the grid of its sampler. The model's own samples of the same
prompts are drawn and measured beside the data: they say how far the data is from the model.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import ArgumentParser
from trl_sipo.scripts.audit_inputs import (
    AuditedLevels,
    AuditedPair,
    add_adapter_option,
    add_data_options,
    add_grid_options,
    add_level_options,
    add_model_options,
    check_adapter,
    load_adapter,
    load_rows,
    measure,
    open_pairs,
    settings_of,
    settings_words,
    training_settings,
    with_adapter,
)
from trl_sipo.scripts.audit_report import (
    prepare_output,
    print_sentences,
    print_tables,
    recorded_command,
    write_audit,
)
from trl_sipo.scripts.audit_weight_curve import describe, find_regions, level_rows, table

if TYPE_CHECKING:
    from torch import Tensor

    from trl_sipo.adapters.base import BackboneAdapter
    from trl_sipo.evaluation.importance_curve import PairWeights
    from trl_sipo.reporting.evaluation_tables import Table
    from trl_sipo.trainer.diffusion_sipo_config import DiffusionSIPOConfig

# Those of the SIPO paper's Table A2.
CLIP_RANGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
OWN_SAMPLES = "own samples"
_MOST_SOURCES = 8  # that are told apart
_DEFAULT_ON_POLICY = 8


def make_parser(prog: str = "trl-sipo audit weights") -> argparse.ArgumentParser:
    """The options; those that a training command has too have its names and defaults."""
    parser = ArgumentParser(
        prog=prog,
        description="Print the importance weight at every noise level, the region that SIPO would mask, and how far "
        "the data is from the model's own samples.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_adapter_option(parser)
    add_data_options(parser, num_pairs=8)
    add_level_options(parser, num_levels=50)
    add_grid_options(parser)
    add = parser.add_argument
    add(
        "--source_column", metavar="NAME", help="tell these parts of the data apart (default: source, if there is one)"
    )
    add("--on_policy", type=int, metavar="N", help="own samples to draw, for as many prompts; 0: none (default: 8)")
    add("--num_inference_steps", type=int, metavar="N", help="of the own samples (default: the pipeline's)")
    add("--guidance_scale", type=float, metavar="SCALE", help="of the own samples (default: the pipeline's)")
    add("--output", type=Path, metavar="DIR", help="folder for weights.json, weights.html and weights.png")
    return parser


def number_of_samples(arguments: argparse.Namespace) -> int:
    """How many samples of the model itself are drawn.

    Raises:
        ConfigurationError: A negative number, or more than there are pairs.
    """
    if arguments.on_policy is None:
        return min(_DEFAULT_ON_POLICY, arguments.num_pairs)
    if not 0 <= arguments.on_policy <= arguments.num_pairs:
        raise ConfigurationError(
            f"`--on_policy {arguments.on_policy}` must lie between 0 and `--num_pairs {arguments.num_pairs}`: each "
            "sample is compared with the pair of its prompt."
        )
    return arguments.on_policy


# ------------------------------------------------------------------------------------------------------- own samples


def own_samples(
    arguments: argparse.Namespace,
    adapter: "BackboneAdapter",
    pairs: Sequence[AuditedPair],
    settings: "DiffusionSIPOConfig",
    size: tuple[int, int],
    folder: Path,
) -> list[AuditedPair]:
    """The model's own samples for the prompts of some pairs, each as both arms of a pair with that pair's index.

    So they get the noise of the pair that they are compared with. The samples stay in the folder: a run that was
    stopped, and another one with the same settings, goes on with them.
    """
    from datasets import Dataset

    from trl_sipo.data.collator import DataCollatorForDiffusionPreference
    from trl_sipo.generation.prompt_sets import PromptRecord
    from trl_sipo.generation.sampling import SamplingSettings, draw_samples, read_samples
    from trl_sipo.trainer.encoding import PairEncoder
    from trl_sipo.trainer.preference_data import as_tensors

    sampling = SamplingSettings(
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        height=size[0],
        width=size[1],
        num_frames=settings.num_frames,
        frame_rate=settings.frame_rate,
        seed=settings.seed,
    )
    draw_samples(adapter, [PromptRecord(f"pair_{pair.index}", pair.prompt) for pair in pairs], folder, sampling)
    paths = [str(sample.path) for sample in read_samples(folder)]
    rows = Dataset.from_dict({"prompt": [pair.prompt for pair in pairs], "chosen": paths, "rejected": paths})
    drawn = as_tensors(rows, adapter, settings, size, OWN_SAMPLES)
    collate, device = DataCollatorForDiffusionPreference(), adapter.pipeline.device
    encode = PairEncoder(adapter, sample_posterior=False, caption_dropout=0.0)
    encoded = [encode(collate([drawn[place]]), device, [], training=False) for place in range(len(pairs))]
    return [
        AuditedPair(pair.index, pair.prompt, OWN_SAMPLES, sample) for pair, sample in zip(pairs, encoded, strict=True)
    ]


def compared_places(num_pairs: int, num_samples: int) -> list[int]:
    """Which pairs the own samples are drawn for: evenly spaced."""
    return [place * num_pairs // num_samples for place in range(num_samples)]


# ------------------------------------------------------------------------------------------------------------ groups


@dataclass(frozen=True)
class Group:
    """Samples of one kind.

    Attributes:
        name: For tables.
        places: (samples,) which of the audited pairs they belong to.
        errors, log_weights: (levels, samples).
    """

    name: str
    places: Sequence[int]
    errors: "Tensor"
    log_weights: "Tensor"

    def of(self, places: Sequence[int]) -> "Group":
        """Those of some pairs, in the order of `places`."""
        kept = [place for place in places if place in self.places]
        columns = [list(self.places).index(place) for place in kept]
        return Group(self.name, kept, self.errors[:, columns], self.log_weights[:, columns])


def arm_groups(weights: "PairWeights", suffix: str = "") -> list[Group]:
    """The chosen and the rejected samples of all pairs."""
    places = range(weights.chosen.shape[1])
    return [
        Group(f"chosen{suffix}", places, weights.chosen_error, weights.chosen),
        Group(f"rejected{suffix}", places, weights.rejected_error, weights.rejected),
    ]


def source_groups(pairs: Sequence[AuditedPair], groups: Sequence[Group]) -> list[Group]:
    """The same samples by where they come from; none where the data does not tell, or tells one thing of all."""
    counts = Counter(pair.source for pair in pairs if pair.source is not None)
    if len(counts) < 2:
        return []
    common = [source for source, _ in counts.most_common(_MOST_SOURCES)]
    found = []
    for source in common:
        places = [place for place, pair in enumerate(pairs) if pair.source == source]
        found += [replace(group.of(places), name=f"{group.name}, {source}") for group in groups]
    return found


def group_numbers(
    groups: Sequence[Group], own: Group | None, prompts: Sequence[str], mask_threshold: float
) -> list[dict[str, Any]]:
    """Mean weight and masked share of each group, and its error beside that on the own samples of the same prompts."""
    from trl_sipo.core.importance import timestep_mask
    from trl_sipo.evaluation.policy_distance import as_numbers, error_excess, share_interval

    rows = []
    for group in [*groups, *([own] if own else [])]:
        of_group = [prompts[place] for place in group.places]
        excess = None
        shared = group.of(own.places) if own and group is not own else None
        if own and shared and shared.places:
            excess = error_excess(
                shared.errors, own.of(shared.places).errors, [prompts[place] for place in shared.places]
            )
        rows.append(
            {
                "name": group.name,
                "samples": len(group.places),
                "mean_weight": float(group.log_weights.double().exp().mean()),
                "masked": as_numbers(share_interval(~timestep_mask(group.log_weights, mask_threshold), of_group)),
                "error_excess": excess and as_numbers(excess.overall),
                "error_excess_by_level": excess and list(excess.by_level),
            }
        )
    return rows


def distance_sentences(groups: Sequence[dict[str, Any]]) -> list[str]:
    """How far the data is from the model, for each group that was compared with its own samples."""
    from trl_sipo.evaluation.policy_distance import distance_words
    from trl_sipo.evaluation.statistics import Interval

    sentences = []
    for row in groups:
        if row["error_excess"] is not None:
            ends = row["error_excess"]
            low = -1.0 if ends["low"] is None else ends["low"]
            high = float("inf") if ends["high"] is None else ends["high"]
            what = f"{row['name']} samples" if row["name"] in ("chosen", "rejected") else f"'{row['name']}'"
            sentences.append(distance_words(what, Interval(ends["estimate"], low, high)))
    return sentences


# ------------------------------------------------------------------------------------------------------------ report


def group_table(rows: Sequence[dict[str, Any]]) -> "Table":
    """The groups as text."""
    from trl_sipo.reporting.evaluation_tables import Table, with_interval

    cells = [
        (
            row["name"],
            str(row["samples"]),
            f"{row['mean_weight']:.4f}",
            with_interval(row["masked"], percent=True),
            "-" if row["error_excess"] is None else with_interval(row["error_excess"], percent=True),
        )
        for row in rows
    ]
    note = (
        "Single samples, not pairs. The last column: the model's error beside that on its own samples of the same "
        "prompts and noise, geometric mean over levels; 0 is data that the model might have drawn. 95 % intervals by "
        "prompt."
    )
    return Table("On and off policy", note, ("samples", "number", "mean w", "masked", "error above own"), cells)


def clip_range_numbers(
    log_weights: "Tensor", prompts: Sequence[str], settings: "DiffusionSIPOConfig", mask_threshold: float
) -> list[dict[str, Any]]:
    """Masked and clipped shares of several clip ranges, the run's own among them."""
    from trl_sipo.evaluation.policy_distance import as_numbers, clip_ranges

    tried = {(value, 1 - value) for value in CLIP_RANGES} | {(settings.clip_range, mask_threshold)}
    return [
        {
            "clip_range": row.clip_range,
            "mask_threshold": row.mask_threshold,
            "masked": as_numbers(row.masked),
            "clipped_by_sipo": none_of_nan(row.clipped[0]),
            "clipped_by_dpo_cm": none_of_nan(row.clipped[1]),
            "sipo_factor": none_of_nan(row.sipo_factor),
            "dpo_cm_factor": none_of_nan(row.dpo_cm_factor),
        }
        for row in clip_ranges(log_weights, prompts, sorted(tried))
    ]


def none_of_nan(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if value != value else value


def clip_range_table(rows: Sequence[dict[str, Any]]) -> "Table":
    """The clip ranges as text."""
    from trl_sipo.reporting.evaluation_tables import Table, number, with_interval

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    cells = [
        (
            f"{row['clip_range']:.4g}",
            f"{row['mask_threshold']:.4g}",
            with_interval(row["masked"], percent=True),
            percent(row["clipped_by_sipo"]),
            percent(row["clipped_by_dpo_cm"]),
            number(row["sipo_factor"]),
            number(row["dpo_cm_factor"]),
        )
        for row in rows
    ]
    header = ("clip_range", "threshold", "masked", "SIPO clips", "C&M clips", "SIPO factor", "C&M factor")
    return Table("Clip ranges", "Of pairs; clipped shares and mean factors are of what is kept.", header, cells)


def curves_of(rows: Sequence[dict[str, Any]], groups: Sequence[Group]) -> dict[str, list[float]]:
    """What the figure shows: the mean weight at every level."""
    names = {"chosen": "chosen_weight", "rejected": "rejected_weight", "pair": "pair_weight"}
    curves = {label: [row[name] for row in rows] for label, name in names.items()}
    return curves | {group.name: group.log_weights.exp().mean(1).tolist() for group in groups}


def adapter_words(before: float, after: float, drift: float) -> str:
    """What the second state of the model changes."""
    return (
        f"With the adapter {after:.1%} of the pairs and levels are masked, without it {before:.1%}; its error on the "
        f"chosen samples is {drift:+.1%} of the model's."
    )


def run(command: str, argv: list[str]) -> None:
    """Measure, print, and write when asked to.

    Raises:
        ConfigurationError: Options that make no sense, or contradict the data or the model.
        BackboneError, DatasetError, NumericalError, StorageError: As the parts do.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    training_settings(arguments)  # before anything is loaded
    num_samples = number_of_samples(arguments)
    draws = prepare_output(arguments.output)
    check_adapter(arguments)
    adapter, rows = load_adapter(arguments), load_rows(arguments)
    settings, size, audited, pairs = open_pairs(arguments, adapter, rows)
    weights = measure(adapter, pairs, audited, settings)
    own = own_group(arguments, adapter, pairs, audited, settings, size, num_samples) if num_samples else None
    tuned = None
    if arguments.adapter is not None:
        tuned = measure(with_adapter(arguments, adapter), pairs, audited, settings, what="With the adapter")

    threshold = 1 - settings.clip_range if settings.mask_threshold is None else settings.mask_threshold
    report, curves = numbers(pairs, audited, weights, own, tuned, settings, threshold)
    shared = settings_of(arguments, adapter, settings, audited, size, len(pairs))
    shared |= {"importance_steps": settings.importance_steps, "mask_threshold": threshold, "own_samples": num_samples}
    report = {"command": recorded_command(command, argv), "settings": shared, **report}
    tables = [group_table(report["groups"]), clip_range_table(report["clip_ranges"])]
    print(table(report["levels"], audited.unit), end="\n\n")
    print_sentences(report["reading"])
    print_tables(tables)
    words = settings_words(shared)
    grid = f"neighbours on a grid of {settings.importance_steps} steps, masked below w = {threshold:.4g}"
    print(f"\n{words}; {grid}.")
    if arguments.output is not None:
        caption = "Mean w(t); what lies in the grey part is masked."
        figures = {"weights": (figure_of(curves, audited, threshold), caption)} if draws else {}
        write_audit(arguments.output, "weights", report, report["reading"], tables, figures)


def own_group(
    arguments: argparse.Namespace,
    adapter: "BackboneAdapter",
    pairs: Sequence[AuditedPair],
    audited: AuditedLevels,
    settings: "DiffusionSIPOConfig",
    size: tuple[int, int],
    num_samples: int,
) -> Group:
    """Draw and measure the model's own samples."""
    places = compared_places(len(pairs), num_samples)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "samples" if arguments.output is None else arguments.output / "own_samples"
        samples = own_samples(arguments, adapter, [pairs[place] for place in places], settings, size, folder)
        weights = measure(adapter, samples, audited, settings, what="On own samples")
    return Group(OWN_SAMPLES, places, weights.chosen_error, weights.chosen)


def numbers(
    pairs: Sequence[AuditedPair],
    audited: AuditedLevels,
    weights: "PairWeights",
    own: Group | None,
    tuned: "PairWeights | None",
    settings: "DiffusionSIPOConfig",
    threshold: float,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The report without its settings, and the curves of the figure."""
    prompts, low_high = [pair.prompt for pair in pairs], audited.within
    rows = level_rows(audited.times.tolist(), audited.levels, weights, threshold)
    regions = find_regions(rows, audited.schedule, audited.unit, threshold, low_high)
    masked_share = mean(row["masked_share"] for row in rows)
    reading = describe(regions, masked_share, len(rows), low_high)
    arms = arm_groups(weights)
    sources = source_groups(pairs, arms)
    states = arm_groups(tuned, ", with the adapter") if tuned else []
    groups = group_numbers([*arms, *sources, *states], own, prompts, threshold)
    reading += distance_sentences([row for row in groups if "adapter" not in row["name"]])
    report = {
        "masked_share": masked_share,
        "masked_regions": regions,
        "reading": reading,
        "groups": groups,
        "clip_ranges": clip_range_numbers(weights.pair, prompts, settings, threshold),
        "levels": rows,
    }
    if tuned:
        tuned_rows = level_rows(audited.times.tolist(), audited.levels, tuned, threshold)
        after = mean(row["masked_share"] for row in tuned_rows)
        drift = float((tuned.chosen_error / weights.chosen_error - 1).mean())
        reading.append(adapter_words(masked_share, after, drift))
        report["adapter"] = {"masked_share": after, "chosen_drift": drift, "levels": tuned_rows}
    return report, curves_of(rows, [*([own] if own else []), *states[:1]])


def figure_of(curves: dict[str, list[float]], audited: AuditedLevels, threshold: float) -> Any:
    """w(t) of every group."""
    from trl_sipo.reporting.figures import importance_weight_figure

    return importance_weight_figure(
        audited.positions,
        curves,
        threshold,
        title="Importance weight of preference pairs",
        level_label=f"{audited.unit} (0 is clean)",
    )
