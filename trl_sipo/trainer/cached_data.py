# SPDX-License-Identifier: Apache-2.0
"""Training from a cache: whether it fits the model and the settings of the run, and what then is not loaded."""

from typing import Any

import torch
from torch.utils.data import Sampler

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.cache.buckets import BucketSampler
from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.cache.manifest import encoders_fingerprint
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig


def needs_encoders(args: DiffusionPreferenceConfig, *data: Any) -> bool:
    """Whether a run encodes prompts or media itself: it draws sample grids, or not all of its data is encoded.

    Args:
        data: Datasets, dicts of them, or `None`.
    """
    splits = [split for item in data for split in (item.values() if isinstance(item, dict) else [item])]
    return bool(args.sample_every_steps) or any(
        split is not None and not isinstance(split, CachedPairs) for split in splits
    )


def check_cache(pairs: CachedPairs, args: DiffusionPreferenceConfig, name: str) -> None:
    """Raise [`ConfigurationError`] when settings contradict what was encoded, before a model is loaded."""
    manifest = pairs.manifest
    random = [
        setting
        for setting in args.random_encoding_settings()
        if setting != "sample_posterior=True" or not manifest.posterior_std
    ]
    if random == ["sample_posterior=True"]:
        raise ConfigurationError(
            f"`sample_posterior=True`, but the {name} cache {str(pairs.folder)!r} holds the posterior's mean alone. "
            "Encode with `--posterior_std`, or leave it off."
        )
    if random:
        raise ConfigurationError(
            f"The {name} dataset is a cache, whose media cannot be encoded anew: {random[0]} would have no effect. "
            "Remove it, or give the images or videos."
        )
    if args.precompute_latents:
        raise ConfigurationError(
            f"`precompute_latents=True`, but the {name} dataset is a cache of latents already. Leave it off."
        )
    if args.arms != "pair" and pairs.num_buckets > 1:
        raise ConfigurationError(
            f"The {name} cache {str(pairs.folder)!r} has {pairs.num_buckets} pairs of shapes, whose arms cannot be "
            "batched apart from one another. Encode with one shape, or give the images or videos."
        )
    wanted = {"resolution": args.size, "num_frames": args.num_frames, "soft_labels": args.soft_labels}
    found = {"resolution": manifest.size, "num_frames": manifest.num_frames, "soft_labels": manifest.soft_labels}
    if args.frame_rate is not None and manifest.num_frames > 1:
        wanted["frame_rate"], found["frame_rate"] = args.frame_rate, manifest.frame_rate
    for setting, value in wanted.items():
        if value is not None and value != found[setting]:
            raise ConfigurationError(
                f"The {name} cache {str(pairs.folder)!r} was encoded with {setting} {found[setting]}, but "
                f"`{setting}` is {value}. Set it to that of the cache, or encode anew."
            )


def settle_for_shapes(pairs: CachedPairs, args: DiffusionPreferenceConfig) -> None:
    """Set, in place, what would let processes wait for one another for ever, where they see pairs of other shapes.

    Arms of different shapes pass the model one after the other: two calls, where another process may make one. With
    each call DDP would broadcast the model's buffers, which are constants, and the calls would not match.
    """
    if pairs.num_buckets > 1 and args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False


def check_cache_fits(
    pairs: CachedPairs, adapter: BackboneAdapter, args: DiffusionPreferenceConfig, size: tuple[int, int], name: str
) -> None:
    """Raise [`ConfigurationError`] when a cache is not that of the model in training, or of its size."""
    manifest = pairs.manifest
    _check_model(pairs, adapter, args, name)
    if size != manifest.size:
        raise ConfigurationError(
            f"The {name} cache {str(pairs.folder)!r} was encoded at {manifest.size[0]} x {manifest.size[1]} pixels, "
            f"and this model's own size is {size[0]} x {size[1]}: set `resolution` to "
            f"{list(manifest.size)}, or encode anew. The strength of beta, and the noise of some models, depend on it."
        )
    expected = {adapter.latent_shape(*shape) for shape in manifest.shapes}
    strange = [shape for shapes in pairs.latent_shapes() for shape in shapes if tuple(shape) not in expected]
    if strange:
        raise ConfigurationError(
            f"The {name} cache {str(pairs.folder)!r} holds latents of the shape {strange[0]}, but those of this model "
            f"have {sorted(expected)[0]}: it was made with another VAE ({manifest.model}). Encode with this model."
        )


def _check_model(pairs: CachedPairs, adapter: BackboneAdapter, args: DiffusionPreferenceConfig, name: str) -> None:
    manifest = pairs.manifest
    source = adapter.pipeline.config.get("_name_or_path") or ""
    revision = (args.model_init_kwargs or {}).get("revision")
    # A pipeline that was built in the process comes from nowhere, and a hub id does not compare with a folder.
    encoders = encoders_fingerprint(source, revision) if source else None
    comparable = None not in (encoders, manifest.encoders) and ("@" in encoders) == ("@" in manifest.encoders)
    if adapter.pipeline_class_name != manifest.pipeline_class or (comparable and encoders != manifest.encoders):
        raise ConfigurationError(
            f"The {name} cache {str(pairs.folder)!r} was made with {manifest.model} ({manifest.pipeline_class}, "
            f"revision {manifest.revision}, encoders {manifest.encoders}), but the model in training is {source} "
            f"({adapter.pipeline_class_name}, revision {revision}, encoders {encoders}). Encode with this model, or "
            "train the one of the cache."
        )


def check_has_encoders(adapter: BackboneAdapter, name: str) -> None:
    """Raise [`ConfigurationError`] when media would have to be encoded by a model that was loaded without encoders."""
    if not adapter.has_encoders:
        raise ConfigurationError(
            f"The {name} dataset is not encoded, and the VAE and the text encoders were not loaded, since the "
            "trainer's own data is. Encode this data too, or give it to the trainer as `eval_dataset`."
        )


def stored_null(dataset: Any) -> dict[str, torch.Tensor] | None:
    """What a cache holds to take the place of a dropped prompt; `None` of other datasets."""
    return dataset.null_conditioning() if isinstance(dataset, CachedPairs) else None


def check_batches(pairs: CachedPairs, args: DiffusionPreferenceConfig, name: str, *, is_training: bool) -> None:
    """Raise [`ConfigurationError`] when batches in the order of the pairs would mix shapes."""
    sizes = {} if is_training else {"per_device_eval_batch_size": args.per_device_eval_batch_size}
    if args.precompute_ref_log_probs:
        sizes["precompute_ref_batch_size"] = args.precompute_ref_batch_size or args.per_device_eval_batch_size
    too_large = [f"`{setting}=1`" for setting, size in sizes.items() if size > 1]
    if pairs.num_buckets > 1 and too_large:
        raise ConfigurationError(
            f"The {name} cache {str(pairs.folder)!r} has {pairs.num_buckets} pairs of shapes, and evaluation and a "
            f"precomputed reference take pairs in their order: set {' and '.join(too_large)}."
        )


def bucket_sampler(dataset: Any, args: DiffusionPreferenceConfig) -> Sampler | None:
    """An order of training pairs in which no batch mixes shapes; `None` where there is one shape only.

    Raises:
        ConfigurationError: The pairs are to come in their order.
    """
    if not isinstance(dataset, CachedPairs) or dataset.num_buckets == 1:
        return None
    if args.train_sampling_strategy != "random":
        raise ConfigurationError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}`, but the cache has {dataset.num_buckets} "
            "pairs of shapes, whose batches are drawn by shape. Leave it at 'random'."
        )
    seed = args.seed if args.data_seed is None else args.data_seed
    return BucketSampler(dataset.index.bucket, args.train_batch_size, seed, dataset.epoch)
