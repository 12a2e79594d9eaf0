# SPDX-License-Identifier: Apache-2.0
"""From the datasets that a user hands to a trainer to datasets of tensors."""

import hashlib
from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.data.formats import Arms, PreferenceFormat, detect_format
from trl_sipo.data.preference_dataset import PreferenceDataset, StreamingPreferenceDataset, stream_columns
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.data.validation import check_preference_dataset
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.cached_data import (
    check_batches,
    check_cache,
    check_cache_fits,
    check_has_encoders,
    settle_for_shapes,
)
from trl_sipo.trainer.description import describe_media
from trl_sipo.trainer.encoding import arms_of


class LatentPairs(torch.utils.data.Dataset):
    """Pairs that were encoded before training, in memory.

    Args:
        prompts: One per pair.
        chosen_latents, rejected_latents: (pairs, ...) float32 on the CPU; of samples of one arm `rejected_latents` is
            `None`.
        frame_rate: (pairs,) frames per second of clips; `None` for images.
        label: (pairs,) probability that the chosen one is preferred, or of samples of one arm whether it is liked;
            `None` without labels.
    """

    def __init__(
        self,
        prompts: list[str],
        chosen_latents: torch.Tensor,
        rejected_latents: torch.Tensor | None,
        frame_rate: torch.Tensor | None = None,
        label: torch.Tensor | None = None,
    ):
        self.prompts = prompts
        self.chosen_latents = chosen_latents
        self.rejected_latents = rejected_latents
        self.of_pair = {"frame_rate": frame_rate, "label": label}

    @property
    def fingerprint(self) -> str:
        """Of what models see of it, which labels are not: equal for equal pairs in equal order."""
        digest = hashlib.blake2b("\0".join(self.prompts).encode(), digest_size=16)
        for values in (self.chosen_latents, self.rejected_latents, self.of_pair["frame_rate"]):
            if values is not None:
                digest.update(values.contiguous().numpy())
        return digest.hexdigest()

    @property
    def arms(self) -> Arms:
        """What samples are made of."""
        if self.rejected_latents is not None:
            return "pair"
        return "chosen" if self.of_pair["label"] is None else "each"

    def with_arms(self, arms: Arms) -> "LatentPairs":
        """The same latents, with samples made of other arms. Raises [`DatasetError`] where they cannot be."""
        if arms == self.arms:
            return self
        if self.rejected_latents is None:
            raise DatasetError(f"latents in memory that were made for samples of {self.arms!r} cannot give {arms!r}.")
        rate, count = self.of_pair["frame_rate"], 2 if arms == "each" else 1
        latents = torch.stack([self.chosen_latents, self.rejected_latents][:count], dim=1).flatten(0, 1)
        return LatentPairs(
            [prompt for prompt in self.prompts for _ in range(count)],
            latents,
            None,
            None if rate is None else rate.repeat_interleave(count),
            torch.tensor([1.0, 0.0]).repeat(len(self)) if arms == "each" else None,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"prompt": self.prompts[index], "chosen_latents": self.chosen_latents[index], "pair_index": index}
        if self.rejected_latents is not None:
            item["rejected_latents"] = self.rejected_latents[index]
        numbers = {name: float(values[index]) for name, values in self.of_pair.items() if values is not None}
        return {**item, **numbers}


PREPARED = (PreferenceDataset, StreamingPreferenceDataset, LatentPairs, CachedPairs)


def for_each_split(dataset: Any, function: Callable[[Any, str], Any]) -> Any:
    """`function(split, name)` of an evaluation dataset, called "eval", or of each of a dict of them; `None` stays."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: function(split, name) for name, split in dataset.items()}
    return function(dataset, "eval")


def check_dataset(dataset: Any, args: DiffusionPreferenceConfig, name: str) -> Any:
    """Check a dataset before any long work and print what was found; returns it.

    Datasets of tensors (`PREPARED`) pass, with samples of the method's arms: they were checked when they were made. A
    cache is held against the settings.

    Raises:
        DatasetError: It is no dataset, or its data cannot be used.
        ConfigurationError: A stream, with settings that need a dataset of known length.
    """
    if dataset is not None:
        args.check_rows(dataset, name)
    if isinstance(dataset, CachedPairs):
        check_cache(dataset, args, name)
        settle_for_shapes(dataset, args)
    if isinstance(dataset, PREPARED):
        return dataset.with_arms(args.arms)
    if dataset is None:
        raise ConfigurationError(f"`{name}_dataset` is required.")
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        advice = (
            "choose a split, such as dataset['train']"
            if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict))
            else "make one with `datasets.Dataset.from_list([{'prompt': ..., 'chosen': ..., 'rejected': ...}])`"
        )
        raise DatasetError(
            f"The {name} dataset is a {type(dataset).__name__}, but a `datasets.Dataset` or `IterableDataset` is "
            f"needed: {advice}."
        )
    if isinstance(dataset, datasets.IterableDataset):
        _check_streaming(args, name)
    report = check_preference_dataset(
        dataset, row_format(dataset, args), num_checked_images=args.num_checked_images, clip=args.clip_sampler()
    )
    if args.process_index == 0:
        counts = ", ".join(f"{key.removeprefix('num_')} {value}" for key, value in report.items() if "num_" in key)
        print(f"{name} dataset: {report['format']} format; {counts}")
    return dataset


def row_format(
    dataset: datasets.Dataset | datasets.IterableDataset, args: DiffusionPreferenceConfig
) -> PreferenceFormat:
    """Which columns hold what, and whether the labels are trained as probabilities.

    Raises:
        DatasetError: Columns of no known format.
        ConfigurationError: `soft_labels` without labels.
    """
    columns = stream_columns(dataset) if isinstance(dataset, datasets.IterableDataset) else dataset.column_names
    fmt = detect_format(columns, args.arms)
    return fmt.with_soft_labels() if args.soft_labels else fmt


def _check_streaming(args: DiffusionPreferenceConfig, name: str) -> None:
    if args.precompute_latents:
        raise ConfigurationError(
            f"`precompute_latents=True` keeps all latents in memory, but the {name} dataset is a stream, whose end is "
            "not known. Turn one of the two off."
        )
    if name == "train" and args.max_steps <= 0:
        raise ConfigurationError(
            "The train dataset is a stream, whose length is not known: set `max_steps` to the number of training "
            "steps."
        )


def as_tensors(
    dataset: Any,
    adapter: BackboneAdapter,
    args: DiffusionPreferenceConfig,
    size: tuple[int, int],
    name: str,
    *,
    is_training: bool = False,
) -> torch.utils.data.Dataset:
    """Rows to tensors. Training data takes the configured crop, flip and start, other data the deterministic ones.

    Args:
        size: Height and width in pixels.

    Raises:
        DatasetError: Latents that cannot be the model's.
        ConfigurationError: Settings that contradict the data, or training data that does not fill a batch.
    """
    if isinstance(dataset, CachedPairs):
        check_cache_fits(dataset, adapter, args, size, name)
        check_batches(dataset, args, name, is_training=is_training)
        if is_training:
            _check_batch_size(len(dataset), args)
        return dataset
    check_has_encoders(adapter, name)
    if isinstance(dataset, PREPARED):
        return dataset
    transform = PairedTransform(size, center_crop=args.center_crop, random_flip=args.random_flip)
    clip = args.clip_sampler()
    if not is_training:
        transform = transform.for_evaluation()
        clip = clip and clip.for_evaluation()
    options = {"fmt": row_format(dataset, args), "transform": transform, "seed": args.seed, "clip": clip}
    if isinstance(dataset, datasets.IterableDataset):
        return StreamingPreferenceDataset(dataset, **options)
    prepared = PreferenceDataset(dataset, **options)
    if is_training:
        _check_batch_size(len(prepared), args)
    if prepared.fmt.holds_latents:
        _check_latents(prepared[0]["chosen_latents"], adapter, args, size, name)
    return precompute_latents(prepared, adapter, args, name) if args.precompute_latents else prepared


def _check_batch_size(num_pairs: int, args: DiffusionPreferenceConfig) -> None:
    """Raise when every batch would be dropped, for a run without a step would end as if all were well."""
    batch_size = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and num_pairs < batch_size:
        raise ConfigurationError(
            f"`dataloader_drop_last=True` drops incomplete batches, but the {num_pairs} training pairs do not fill "
            f"one of {batch_size} (`per_device_train_batch_size={args.per_device_train_batch_size}` on "
            f"{args.world_size} process(es)), so there would be no training step. Lower the batch size, or keep "
            "incomplete batches."
        )


def _check_latents(
    latents: torch.Tensor,
    adapter: BackboneAdapter,
    args: DiffusionPreferenceConfig,
    size: tuple[int, int],
    name: str,
) -> None:
    """Raise when latents cannot be those of the backbone's VAE, or settings ask for what only images allow."""
    if args.random_encoding_settings():
        raise ConfigurationError(
            f"The {name} dataset holds latents, which cannot be encoded anew: {args.random_encoding_settings()[0]} "
            "would have no effect. Remove it, or give the images."
        )
    expected = args.latent_shape_of(adapter.latent_shape(*size, args.num_frames))
    if latents.ndim != len(expected) or latents.shape[0] != expected[0]:
        raise DatasetError(
            f"The {name} dataset holds latents of the shape {tuple(latents.shape)}, but those of this model have "
            f"{expected[0]} channels and {len(expected)} dimensions, such as {expected}. Encode the images with its "
            "VAE, or give the images."
        )
    if tuple(latents.shape) != expected:
        raise ConfigurationError(
            f"The {name} dataset holds latents of the shape {tuple(latents.shape)}, but those of "
            f"{describe_media(size, args.num_frames)} have {expected}: set `resolution` and `num_frames` to what was "
            "encoded. The strength of beta, and the noise of some models, depend on them."
        )


def precompute_latents(
    dataset: PreferenceDataset, adapter: BackboneAdapter, args: DiffusionPreferenceConfig, name: str
) -> LatentPairs | PreferenceDataset:
    """Encode the images or clips of every sample once (posterior mean) and keep the latents in memory."""
    if dataset.fmt.holds_latents:
        return dataset
    loader = DataLoader(
        dataset,
        batch_size=adapter.vae_slice_size,  # more would wait in memory for nothing: a clip takes hundreds of MB
        collate_fn=DataCollatorForDiffusionPreference(),
        num_workers=args.dataloader_num_workers,
        prefetch_factor=1 if args.dataloader_num_workers else None,
    )
    prompts: list[str] = []
    latents: dict[str, list[torch.Tensor]] = {"chosen": [], "rejected": []}
    numbers: dict[str, list[torch.Tensor]] = {"frame_rate": [], "label": []}
    for batch in tqdm(loader, desc=f"Encoding the {name} dataset", disable=args.disable_tqdm):
        prompts.extend(batch["prompt"])
        for name in numbers.keys() & batch.keys():
            numbers[name].append(batch[name])
        for arm in arms_of(batch):
            latents[arm].append(adapter.encode_media(batch[f"{arm}_pixels"]).cpu())
    of_pair = {name: torch.cat(parts) for name, parts in numbers.items() if parts}
    chosen, rejected = (torch.cat(parts) if parts else None for parts in latents.values())
    return LatentPairs(prompts, chosen, rejected, **of_pair)
