# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo encode`: encode pairs once, for training that loads neither the VAE nor the text encoders.

Several processes share the work: `torchrun --nproc_per_node 4 -m trl_sipo.scripts.encode --output ...`.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import EXPECTED_ERRORS, ConfigurationError, DatasetError
from trl_sipo.printing import ArgumentParser

if TYPE_CHECKING:
    from trl_sipo.adapters.base import BackboneAdapter
    from trl_sipo.data.cache.encode import Share
    from trl_sipo.data.cache.manifest import Manifest
    from trl_sipo.data.preference_dataset import PreferenceDataset

MAX_BROKEN = 0.1
DTYPES = ("bfloat16", "float32", "float16")


def make_parser(prog: str = "trl-sipo encode") -> argparse.ArgumentParser:
    """The options; those that a training command has too have its names."""
    parser = ArgumentParser(
        prog=prog,
        description="Encode pairs once, into a cache that training commands take as `dataset_name`. Run it again to "
        "go on after an interruption; under torchrun, processes share the work.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the cache, or of what is exported")
    add("--model_name_or_path", metavar="PATH", help="hub id or local path of a diffusers pipeline")
    add("--model_revision", metavar="NAME", help="branch, tag or commit on the hub")
    add("--variant", metavar="NAME", help="variant of the weight files, such as fp16")
    add("--dataset_name", metavar="PATH", help="hub id or local path of preference pairs")
    add("--dataset_config", metavar="NAME", help="configuration of a hub dataset")
    add("--dataset_split", default="train", help="default: %(default)s")
    add("--dataset_format", metavar="NAME", help="layout of the data; recognised if not given")
    add("--dataset_media_folder", metavar="DIR", help="folder to which paths are relative; else their table's")
    add("--min_confidence", type=float, help="leave out pairs whose label gives neither side this share of the votes")
    add("--skip_rows", metavar="FILE", help="file of bad rows to leave out (trl-sipo data check)")
    add(
        "--skip_broken", action="store_true", help="leave out and list pairs that cannot be read; else they are errors"
    )
    add("--max_broken", type=float, metavar="SHARE", help="end when more of the pairs are broken (default: 0.1)")
    add("--limit", type=int, metavar="PAIRS", help="encode the first pairs only")
    add("--soft_labels", action="store_true", help="store labels as probabilities; ties are pairs then")
    add("--resolution", type=int, nargs="+", metavar="PIXELS", help="height and width; one number for a square")
    add("--buckets", action="store_true", help="keep shapes: several sizes of about the area of the resolution")
    add("--num_frames", type=int, default=1, help="frames of video clips; 1 takes images (default: %(default)s)")
    add("--frame_buckets", type=int, nargs="+", metavar="FRAMES", help="other numbers of frames that videos may take")
    add("--frame_rate", type=float, help="frames per second of the clips (default: each video's own)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of what is stored (default: %(default)s)")
    add("--text_dtype", choices=DTYPES, help="of the text encoders' weights (default: that of --dtype)")
    add("--vae_dtype", choices=DTYPES, default="float32", help="of the VAE's weights (default: %(default)s)")
    add("--posterior_std", action="store_true", help="store what `sample_posterior` needs; twice the space")
    add("--shard_mb", type=float, default=256, help="size of a file of latents, about (default: %(default)s)")
    add("--shard_prompts", type=int, default=256, help="prompts in a file of embeddings (default: %(default)s)")
    add("--num_workers", type=int, default=2, help="processes that read media (default: %(default)s)")
    add("--device", help="such as cuda:1 or cpu (default: the process's GPU, if there is one)")
    add("--export", choices=("webdataset",), help="export the cache given by --cache instead of encoding")
    add("--cache", type=Path, metavar="DIR", help="the cache to export")
    return parser


def run(command: str, argv: list[str]) -> None:
    """Encode, or export what is encoded.

    Raises:
        BackboneError: The model cannot be loaded.
        ConfigurationError: Contradicting options, or a folder with another cache.
        DatasetError: Pairs that cannot be used.
        NumericalError: Latents that are not finite.
        StorageError: The disk is full, say.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    check_arguments(arguments)
    if arguments.export is not None:
        _export(arguments)
        return
    from trl_sipo.data.cache.broken import BAD_ROWS
    from trl_sipo.data.cache.encode import encode_pairs

    share = share_of_process()
    rows, numbers = load_rows(arguments)
    count_pairs(arguments, rows)  # before the encoders are loaded, which may take minutes
    adapter = load_encoders(arguments)
    manifest = make_manifest(arguments, adapter, rows)
    dataset = make_dataset(rows, manifest, numbers)
    if share.rank == 0:
        print(f"Encoding {manifest.num_pairs} pairs with {manifest.model} into {arguments.output}")
    try:
        num_broken = encode_pairs(
            adapter,
            dataset,
            rows,
            manifest,
            arguments.output,
            share=share,
            max_broken=max_broken(arguments),
            num_workers=arguments.num_workers,
            show_progress=share.rank == 0,
        )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("What is encoded is kept: run the same command again to go on.") from error
    if share.rank == 0:
        if num_broken:
            kept = f"{manifest.num_pairs - num_broken} of {manifest.num_pairs} pairs are encoded"
            print(f"{kept}; {num_broken} cannot be read, and are listed in {arguments.output / BAD_ROWS}.")
        print(f"Train on it with `--dataset_name {arguments.output}`.")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] for options that are out of range, missing, or contradict one another."""
    if arguments.export is not None:
        if arguments.cache is None:
            raise ConfigurationError("`--export` needs `--cache`, the folder that was encoded.")
        return
    for name in ("model_name_or_path", "dataset_name"):
        if getattr(arguments, name) is None:
            raise ConfigurationError(f"`--{name}` is required.")
    if arguments.cache is not None:
        raise ConfigurationError("`--cache` is what `--export` reads. The folder to write is `--output`.")
    _check_numbers(arguments)
    if arguments.max_broken is not None and not arguments.skip_broken:
        raise ConfigurationError(
            "`--max_broken` is a limit to what `--skip_broken` leaves out: give both, or neither."
        )


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("shard_prompts", 1), ("num_workers", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigurationError(f"`--{name}` must be at least {least}, got {value}.")
    if arguments.max_broken is not None and not 0 <= arguments.max_broken <= 1:
        raise ConfigurationError(f"`--max_broken` is a share of the pairs, in [0, 1]; got {arguments.max_broken}.")
    if not 0 < arguments.shard_mb < math.inf:
        raise ConfigurationError(f"`--shard_mb` must be a positive number, got {arguments.shard_mb}.")
    if arguments.frame_rate is not None and arguments.num_frames == 1:
        raise ConfigurationError("`--frame_rate` is of videos: give `--num_frames` more than one frame, or remove it.")
    if arguments.resolution is not None and len(arguments.resolution) > 2:
        raise ConfigurationError(f"`--resolution` is a height and a width, or one number; got {arguments.resolution}.")


def _export(arguments: argparse.Namespace) -> None:
    from trl_sipo.data.cache.dataset import CachedPairs
    from trl_sipo.data.cache.webdataset import export_webdataset

    number = export_webdataset(CachedPairs(arguments.cache), arguments.output)
    print(f"Wrote {number} file(s) to {arguments.output}.")


def share_of_process() -> "Share":
    """This process's share of the work, from the variables that torchrun sets."""
    from trl_sipo.data.cache.encode import Share

    return Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def max_broken(arguments: argparse.Namespace) -> float | None:
    """The share of the pairs that may be left out as broken; None: none, the first one is an error."""
    if not arguments.skip_broken:
        return None
    return MAX_BROKEN if arguments.max_broken is None else arguments.max_broken


def load_rows(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The rows that are to be encoded, and their numbers in the split as it was loaded.

    Raises:
        DatasetError: There are none, or they are encoded already.
    """
    import datasets

    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.data.row_selection import remaining_rows

    rows = load_preference_dataset(
        arguments.dataset_name,
        name=arguments.dataset_config,
        split=arguments.dataset_split,
        format=arguments.dataset_format,
        media_folder=arguments.dataset_media_folder,
    )
    if not isinstance(rows, datasets.Dataset):
        raise DatasetError(f"`--dataset_name {arguments.dataset_name}` is a cache already: give what it was made of.")
    numbers = remaining_rows(rows, arguments.skip_rows, arguments.min_confidence)
    return (rows if len(numbers) == len(rows) else rows.select(numbers)), numbers


def count_pairs(arguments: argparse.Namespace, rows: Any) -> int:
    """How many pairs are to be encoded, from the columns of labels alone.

    Raises:
        DatasetError: Columns of no known format, labels out of range, or no pairs.
    """
    from trl_sipo.data.formats import select_pairs

    selection = select_pairs(rows, _format_of(rows, arguments.soft_labels))
    num_pairs = len(selection.kept)
    if num_pairs == 0:
        raise DatasetError(
            f"There are no pairs to encode: of {len(rows)} rows {selection.num_ties} are ties and "
            f"{selection.num_unlabelled} have no label."
        )
    return num_pairs if arguments.limit is None else min(num_pairs, arguments.limit)


def load_encoders(arguments: argparse.Namespace) -> "BackboneAdapter":
    """The pipeline with the weights of its VAE and text encoders, and without those of its denoiser.

    Raises:
        BackboneError: It cannot be loaded.
        ConfigurationError: There is no such device.
    """
    import torch

    from trl_sipo.adapters import adapter_for, denoiser_names, load_pipeline
    from trl_sipo.generation.processes import chosen_device

    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = chosen_device(arguments.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    revision = {} if arguments.model_revision is None else {"revision": arguments.model_revision}
    variant = {} if arguments.variant is None else {"variant": arguments.variant}
    text_dtype = getattr(torch, arguments.text_dtype or arguments.dtype)
    pipeline: Any = load_pipeline(
        arguments.model_name_or_path,
        weightless=denoiser_names(arguments.model_name_or_path, **revision),
        dtype={"default": text_dtype, "vae": getattr(torch, arguments.vae_dtype)},
        **revision,
        **variant,
    )
    adapter = adapter_for(pipeline)
    for module in adapter.frozen_modules():
        module.to(device)
    return adapter


def make_manifest(arguments: argparse.Namespace, adapter: "BackboneAdapter", rows: Any) -> "Manifest":
    """What the cache is to be.

    Raises:
        ConfigurationError: A size or length that the model does not take.
        DatasetError: Columns of no known format, or no pairs.
    """
    from trl_sipo.data.cache.buckets import bucket_sizes
    from trl_sipo.data.cache.manifest import Manifest, data_fingerprint, encoders_fingerprint

    size = tuple(arguments.resolution * 2)[:2] if arguments.resolution else tuple(adapter.default_size)
    lengths = tuple(sorted({arguments.num_frames, *(arguments.frame_buckets or ())}))
    for length in lengths:
        adapter.validate_size(*size, length)
    if len(lengths) > 1 and lengths[0] == 1:
        raise ConfigurationError("`--frame_buckets` are of videos: give `--num_frames` more than one frame.")
    fmt = _format_of(rows, arguments.soft_labels)
    num_pairs = count_pairs(arguments, rows)
    model, revision = arguments.model_name_or_path, arguments.model_revision
    return Manifest(
        model=model,
        revision=revision,
        variant=arguments.variant,
        pipeline_class=adapter.pipeline_class_name,
        encoders=encoders_fingerprint(model, revision),
        data=data_fingerprint(rows, fmt, num_pairs),
        split=arguments.dataset_split,
        num_pairs=num_pairs,
        soft_labels=arguments.soft_labels,
        size=size,
        buckets=bucket_sizes(size, adapter.spatial_multiple) if arguments.buckets else None,
        num_frames=arguments.num_frames,
        frame_buckets=lengths if arguments.frame_buckets else None,
        frame_rate=arguments.frame_rate,
        dtype=arguments.dtype,
        text_dtype=arguments.text_dtype or arguments.dtype,
        vae_dtype=arguments.vae_dtype,
        posterior_std=arguments.posterior_std,
        shard_bytes=round(arguments.shard_mb * 2**20),
        prompts_per_shard=arguments.shard_prompts,
    )


def make_dataset(rows: Any, manifest: "Manifest", numbers: Any = None) -> "PreferenceDataset":
    """The pairs as tensors, as training takes them without any randomness.

    Args:
        numbers: of the rows, in the data that they were selected from; None: they are all of it.
    """
    from trl_sipo.data.cache.buckets import BucketTransform
    from trl_sipo.data.preference_dataset import PreferenceDataset
    from trl_sipo.data.transforms import PairedTransform

    transform: Any = PairedTransform(manifest.size) if manifest.buckets is None else BucketTransform(manifest.buckets)
    fmt = _format_of(rows, manifest.soft_labels)
    return PreferenceDataset(rows, fmt=fmt, transform=transform, clip=manifest.clip_sampler(), numbers=numbers)


def _format_of(rows: Any, soft_labels: bool) -> Any:
    from trl_sipo.data.formats import detect_format

    fmt = detect_format(rows.column_names)
    if fmt.holds_latents:
        raise DatasetError("The dataset holds latents already, without embeddings: give the images or videos.")
    return fmt.with_soft_labels() if soft_labels else fmt


def main(argv: list[str]) -> int:
    """As `run`; a mistake of the user is one line and status 2."""
    try:
        run("encode", argv)
    except EXPECTED_ERRORS as error:
        print(f"encode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nencode: interrupted. {error}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
