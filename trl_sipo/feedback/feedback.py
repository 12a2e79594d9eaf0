# SPDX-License-Identifier: Apache-2.0
"""AI feedback (SIPO paper, Sec. 4.4): sample a model, score the samples, and make preference pairs of them.

<output>/samples/         what the model drew, resumable
<output>/scores.parquet   what each reward says of each sample
<output>/pairs.parquet    canonical pairs: prompt, chosen, rejected, margin, category, source, pair_id
<output>/held_out.parquet the same for prompts that training does not see, where a share is held out
<output>/sft.parquet      the best samples, for supervised fine-tuning
<output>/feedback.json    settings, counts and how the rewards contradict one another
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from trl_sipo.data.cache.shards import write_whole
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.feedback.pairing import (
    SampleScores,
    ScoredPair,
    agreement_rate,
    check_pairing,
    conflicts,
    make_pairs,
    top_samples,
)
from trl_sipo.generation.media_files import VIDEO_SUFFIX
from trl_sipo.generation.sampling import Sample
from trl_sipo.generation.scoring import ScoredSamples

PAIRS_FILE, HELD_OUT_FILE, SFT_FILE, REPORT_FILE = "pairs.parquet", "held_out.parquet", "sft.parquet", "feedback.json"
_ROWS_AT_A_TIME = 64  # held in memory, with their files


@dataclass(frozen=True)
class FeedbackSettings:
    """How pairs are made of scores; see `trl_sipo.feedback.pairing`.

    Args:
        selection: "best_worst" or "all".
        combine: "weighted", "consensus" or "pareto".
        weights: Reward's name -> weight.
        min_margin: In standard deviations.
        held_out_share: Of the prompts, in [0, 1): their pairs go to another file, for evaluation. Which ones depends
            on their ids alone.
        sft_per_prompt: Best samples of each prompt that are kept for supervised fine-tuning; 0 keeps none.
        sft_quantile: Of these, only those that score above this quantile of all samples.
    """

    selection: str = "best_worst"
    combine: str = "weighted"
    weights: Mapping[str, float] = field(default_factory=dict)
    min_margin: float = 0.0
    held_out_share: float = 0.0
    sft_per_prompt: int = 1
    sft_quantile: float = 0.5

    def check(self, reward_names: Sequence[str]) -> None:
        """Raise [`ConfigurationError`] on options out of range, before anything is sampled."""
        check_pairing(self.selection, self.combine, self.weights, self.min_margin, reward_names)
        if not 0 <= self.held_out_share < 1:
            raise ConfigurationError(f"held_out_share={self.held_out_share} must be a share in [0, 1).")
        if self.sft_per_prompt < 0 or not 0 <= self.sft_quantile < 1:
            raise ConfigurationError(
                f"need sft_per_prompt >= 0 and 0 <= sft_quantile < 1, got {self.sft_per_prompt}, {self.sft_quantile}."
            )


def write_feedback(scored: ScoredSamples, output: Path, settings: FeedbackSettings, *, source: str) -> dict[str, Any]:
    """Make pairs and the set for fine-tuning of scored samples, and write them.

    Args:
        source: What the pairs say where they come from, such as the model's name.

    Returns:
        The report, as it is written.

    Raises:
        DatasetError: No pair is left, or all are held out.
        StorageError: A file cannot be written.
    """
    samples = as_sample_scores(scored)
    pairs = make_pairs(
        samples,
        selection=settings.selection,
        combine=settings.combine,
        weights=settings.weights,
        min_margin=settings.min_margin,
    )
    if not pairs:
        raise DatasetError(
            f"No pair of {len(scored.samples)} samples of {len(samples.samples_of())} prompts is left with "
            f"combine={settings.combine!r} and min_margin={settings.min_margin}. Draw more samples of each prompt, "
            "ask for a smaller margin, or for less agreement of the rewards."
        )
    held = {prompt_id for prompt_id in samples.samples_of() if is_held_out(prompt_id, settings.held_out_share)}
    groups = {
        PAIRS_FILE: [pair for pair in pairs if pair.prompt_id not in held],
        HELD_OUT_FILE: [pair for pair in pairs if pair.prompt_id in held],
    }
    if not groups[PAIRS_FILE]:
        raise DatasetError(
            f"All {len(pairs)} pairs are held out with held_out_share={settings.held_out_share}, and none is left to "
            "train on. Hold out a smaller share, or give more prompts."
        )
    for name in (REPORT_FILE, *groups, SFT_FILE):  # of other settings: nothing may pass for these
        (output / name).unlink(missing_ok=True)
    for name, group in groups.items():
        if group:
            write_pairs(output / name, scored, group, source=source)
    kept = _best_samples(samples, settings, held)
    if kept:
        write_samples(output / SFT_FILE, scored, kept)
    counts = {"pairs": len(groups[PAIRS_FILE]), "held_out_pairs": len(groups[HELD_OUT_FILE]), "sft": len(kept)}
    report = {**_report(scored, samples, settings), **counts}
    text = json.dumps(report, indent=1, default=str) + "\n"
    write_whole(output / REPORT_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return report


def as_sample_scores(scored: ScoredSamples) -> SampleScores:
    """What pairing needs of scored samples."""
    directions = {name: info.higher_is_better for name, info in scored.infos.items()}
    return SampleScores(scored.prompt_ids, scored.scores, directions)


def is_held_out(prompt_id: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out part: by a hash of its id, whatever other prompts there are."""
    digest = hashlib.sha256(prompt_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _best_samples(samples: SampleScores, settings: FeedbackSettings, held: set[str]) -> list[int]:
    if settings.sft_per_prompt == 0:
        return []
    options = {"num_per_prompt": settings.sft_per_prompt, "quantile": settings.sft_quantile}
    best = top_samples(samples, combine_weights=settings.weights, **options)
    return [index for index in best if samples.prompt_ids[index] not in held]


def _report(scored: ScoredSamples, samples: SampleScores, settings: FeedbackSettings) -> dict[str, Any]:
    found = [dataclasses.asdict(conflict) for conflict in conflicts(samples)]
    for row in found:
        row["conflict_rate"] = None if math.isnan(row["conflict_rate"]) else row["conflict_rate"]
    agreement = agreement_rate(samples)
    return {
        "settings": dataclasses.asdict(settings),
        "samples": len(scored.samples),
        "prompts": len(samples.samples_of()),
        "rewards": {
            name: {
                "convention": info.convention,
                "licence": info.licence,
                "higher_is_better": info.higher_is_better,
                "mean": float(scored.scores[name].mean()),
                "standard_deviation": float(scored.scores[name].std()),
            }
            for name, info in scored.infos.items()
        },
        "conflicts": found,
        "all_agree": None if math.isnan(agreement) else agreement,
    }


def write_pairs(path: Path, scored: ScoredSamples, pairs: Sequence[ScoredPair], *, source: str) -> None:
    """Write pairs in the canonical schema, files of the samples included, so that the table stands alone."""

    def row(pair: ScoredPair) -> dict[str, Any]:
        chosen, rejected = scored.samples[pair.chosen], scored.samples[pair.rejected]
        return {
            "prompt": chosen.record.prompt,
            "chosen": stored_sample(chosen),
            "rejected": stored_sample(rejected),
            "margin": pair.margin,
            "category": chosen.record.category,
            "source": source,
            "pair_id": f"{pair.prompt_id}-{chosen.index:03d}-{rejected.index:03d}",
        }

    write_rows(path, pair_features(_medium(scored.samples[0])), pairs, row)


def pair_features(medium: Any) -> datasets.Features:
    """The canonical columns of pairs of a `datasets.Image` or `datasets.Video`."""
    texts = {name: datasets.Value("string") for name in ("category", "source", "pair_id")}
    media = {"prompt": datasets.Value("string"), "chosen": medium, "rejected": medium}
    return datasets.Features({**media, "margin": datasets.Value("float64"), **texts})


def write_samples(path: Path, scored: ScoredSamples, indices: Sequence[int]) -> None:
    """Write samples as rows of prompt and image (or video), with their scores."""
    kind = "video" if scored.samples[0].path.suffix == VIDEO_SUFFIX else "image"
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            kind: _medium(scored.samples[0]),
            **{name: datasets.Value("float64") for name in scored.scores},
        }
    )

    def row(index: int) -> dict[str, Any]:
        sample = scored.samples[index]
        scores = {name: float(values[index]) for name, values in scored.scores.items()}
        return {"prompt": sample.record.prompt, kind: stored_sample(sample), **scores}

    write_rows(path, features, indices, row)


def _medium(sample: Sample) -> Any:
    return datasets.Video() if sample.path.suffix == VIDEO_SUFFIX else datasets.Image()


def stored_sample(sample: Sample) -> dict[str, Any]:
    """A sample's file as `datasets` stores it."""
    return {"bytes": sample.path.read_bytes(), "path": f"{sample.record.prompt_id}-{sample.path.name}"}


def write_rows(
    path: Path, features: datasets.Features, items: Sequence[Any], row: Callable[[Any], dict[str, Any]]
) -> None:
    """Write `row` of each item as Parquet, some at a time.

    Raises:
        StorageError: It cannot be written.
    """
    schema = features.arrow_schema

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(items), _ROWS_AT_A_TIME):
                rows = [row(item) for item in items[start : start + _ROWS_AT_A_TIME]]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))

    write_whole(path, write)
