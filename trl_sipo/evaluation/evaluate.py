# SPDX-License-Identifier: Apache-2.0
"""Sample, score and compare models: the same prompts, noise, sampler and guidance for all, one model in memory.

<output>/samples/<model>/     what each model drew, resumable
<output>/scores.parquet       what each reward says of each sample of each model
<output>/scores.sqlite        scores by content, so that nothing is scored twice
<output>/errors/<model>.safetensors    errors on held-out pairs
<output>/evaluation.json, metrics.csv, report.md, report.html, grids/*.png
"""

import dataclasses
import gc
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.cache.shards import write_whole
from trl_sipo.evaluation.diversity import Features, pixel_features
from trl_sipo.evaluation.held_out import HeldOutErrors, held_out_errors
from trl_sipo.generation.identity import describe_model, read_settings, setting_differences
from trl_sipo.generation.models import ModelSpec, load_model
from trl_sipo.generation.processes import process_state
from trl_sipo.generation.prompt_sets import PromptRecord
from trl_sipo.generation.sampling import SamplingSettings, draw_samples, read_samples
from trl_sipo.generation.scoring import ScoredSamples, score_samples
from trl_sipo.rewards.base import Reward
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig

logger = logging.getLogger(__name__)

_FEATURES_AT_A_TIME = 64
_DENOISERS = ("unet", "transformer")  # how the names of the components that are trained begin


@dataclass(frozen=True)
class HeldOutData:
    """Pairs to measure implicit preferences on.

    Args:
        rows: As `load_preference_dataset` gives them.
        name: Of the dataset, and what else tells it from others; errors are kept by it.
        args: Resolution, frames, number of noise levels and their seed.
        max_pairs: Take the first ones only.
    """

    rows: Any
    name: str
    args: DiffusionPreferenceConfig
    max_pairs: int | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of each model; names in the order in which the models were given, the base first.

    Attributes:
        scored, features, errors: By model.
        drawn_otherwise: By model, what its samples do not share with the base's; absent where they share all.
    """

    scored: Mapping[str, ScoredSamples]
    features: Mapping[str, Tensor]
    errors: Mapping[str, HeldOutErrors]
    drawn_otherwise: Mapping[str, Sequence[str]]


def measure_models(
    specs: Sequence[ModelSpec],
    prompts: Sequence[PromptRecord],
    rewards: Sequence[Reward],
    output: Path,
    sampling: SamplingSettings,
    *,
    held_out: HeldOutData | None = None,
    features: Features = pixel_features,
    dtype: str = "float32",
    device: str | None = None,
    sampling_batch_size: int = 4,
    scoring_batch_size: int = 16,
) -> Measured:
    """Draw and score what is missing, model by model; every process of the run must call it.

    Args:
        specs: Models, the base first.
        rewards: At least one.
        features: What variety and drift are measured on.
        dtype, device: Of the models.

    Raises:
        BackboneError, ConfigurationError, DatasetError, NumericalError, RewardError, StorageError: As the parts do.
    """
    errors: dict[str, HeldOutErrors] = {}
    base_encoders: dict[str, Any] = {}
    for spec in specs:
        model = load_model(spec, dtype=dtype, device=device)
        if held_out is not None:  # first, since data that do not fit the model end the run
            path, encoders = output / "errors" / f"{spec.name}.safetensors", _encoders(model)
            errors[spec.name] = kept_errors(path, model, held_out, is_known_to_fit=encoders == base_encoders)
            base_encoders = base_encoders or encoders
        folder = output / "samples" / spec.name
        draw_samples(model, prompts, folder, sampling, batch_size=sampling_batch_size, name=spec.name)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    folders = {spec.name: output / "samples" / spec.name for spec in specs}
    scored = {name: score_samples(path, rewards, batch_size=scoring_batch_size) for name, path in folders.items()}
    found = {name: folder_features(path, features) for name, path in folders.items()}
    if process_state().is_main_process:
        write_scores(output / "scores.parquet", scored)
    return Measured(scored, found, errors, drawn_otherwise(folders))


def _encoders(model: BackboneAdapter) -> dict[str, Any]:
    """What pairs are encoded by: two models that share it can use one cache."""
    described = describe_model(model)
    parts = {name: value for name, value in described["weights"].items() if not name.startswith(_DENOISERS)}
    return {"pipeline": described["pipeline"], "size": model.default_size, **parts}


def drawn_otherwise(folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """What the samples of each folder do not share with the first one's, beside the model: steps, scale, sampler."""

    def settings_of(folder: Path) -> dict[str, Any]:
        settings = read_settings(folder)
        return {**settings["settings"], "scheduler": settings["model"]["scheduler"]}

    base, *others = folders
    before, found = settings_of(folders[base]), {}
    for name in others:
        differences = setting_differences(before, settings_of(folders[name]))
        if differences:
            found[name] = [f"{setting} {own!r} (of {base} {its!r})" for setting, its, own in differences]
    return found


def folder_features(folder: Path, features: Features) -> Tensor:
    """(n, features) of all samples of a folder; every process of the run must call it, and takes its share."""
    samples, state = list(read_samples(folder)), process_state()
    share = samples[state.process_index :: state.num_processes]
    starts = range(0, len(share), _FEATURES_AT_A_TIME)
    own = [features([s.open() for s in share[start : start + _FEATURES_AT_A_TIME]]) for start in starts]
    parts = [torch.cat(part) if part else None for part in gather_object([own])]
    width = next(part.shape[1] for part in parts if part is not None)
    found = torch.empty(len(samples), width)
    for first, part in enumerate(parts):  # process p of P has every P-th, from p
        if part is not None:
            found[first :: len(parts)] = part
    return found


def write_scores(path: Path, scored: Mapping[str, ScoredSamples]) -> None:
    """One table of the scores of all models, with a column that names them."""
    tables = [
        samples.table().add_column(0, "model", pa.array([name] * len(samples.samples), pa.string()))
        for name, samples in scored.items()
    ]
    write_whole(path, lambda temporary: pq.write_table(pa.concat_tables(tables), temporary))


def kept_errors(
    path: Path, model: BackboneAdapter, held_out: HeldOutData, *, is_known_to_fit: bool = False
) -> HeldOutErrors:
    """Errors on held-out pairs; those of an earlier run, where model, pairs and settings are the same.

    Raises:
        StorageError: They cannot be written.
    """
    key = _errors_key(model, held_out)
    kept = _read_errors(path, key)
    # All processes measure, or none: they wait for one another in it.
    if all(gather_object([kept is not None])):
        return kept  # type: ignore[return-value]
    options = {"max_pairs": held_out.max_pairs, "is_known_to_fit": is_known_to_fit}
    errors = held_out_errors(model, held_out.rows, held_out.args, **options)
    if process_state().is_main_process:
        metadata = {"key": key, "times": json.dumps(errors.times), "prompts": json.dumps(errors.prompts)}
        tensors = {"chosen": errors.chosen.contiguous(), "rejected": errors.rejected.contiguous()}
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))
    return errors


def _errors_key(model: BackboneAdapter, held_out: HeldOutData) -> str:
    names = ("resolution", "num_frames", "frame_rate", "eval_noise_levels", "eval_noise_seed", "timestep_shift")
    settings = {name: getattr(held_out.args, name) for name in names}
    # Of the rows, what `datasets` itself knows them by, or what a cache says of itself.
    manifest = getattr(held_out.rows, "manifest", None)
    fingerprint = getattr(held_out.rows, "_fingerprint", None) if manifest is None else manifest.fingerprint
    rows = {"pairs": len(held_out.rows), "max_pairs": held_out.max_pairs, "fingerprint": fingerprint}
    data = {"name": held_out.name, **rows, "settings": settings}
    return json.dumps({"model": describe_model(model), "data": data}, sort_keys=True, default=str)


def _read_errors(path: Path, key: str) -> HeldOutErrors | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            times, prompts = (tuple(json.loads(metadata[name])) for name in ("times", "prompts"))
            return HeldOutErrors(times, prompts, file.get_tensor("chosen"), file.get_tensor("rejected"))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        logger.warning("%s cannot be read (%s); it is measured again.", path, error)
        return None


def as_json(value: Any) -> Any:
    """Dataclasses and tuples as JSON has them; an infinite end of an interval is null there."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not torch.isfinite(torch.tensor(value)):
        return None
    return value
