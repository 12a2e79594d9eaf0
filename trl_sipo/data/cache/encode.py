# SPDX-License-Identifier: Apache-2.0
"""Encoding pairs into a cache: one file is one unit of work, and each process takes its own.

A killed run goes on with the files that are missing. What is in a file does not depend on who writes it: batches never
reach from one file into the next.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.cache.broken import (
    Attempted,
    Attempts,
    Tolerance,
    forget_doubtful,
    settle_broken,
    write_broken,
)
from trl_sipo.data.cache.manifest import MANIFEST, NUMBERS, Manifest, check_same, is_cache, read_manifest
from trl_sipo.data.cache.plan import (
    INDEX,
    NULL_FILE,
    PROMPT,
    PROMPTS,
    Index,
    Shape,
    latents_file,
    read_index,
    text_file,
    write_plan,
)
from trl_sipo.data.cache.shards import ragged, write_tensors
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError

# Prompts that pass the text encoders together.
TEXT_BATCH_SIZE = 16

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's.

    Args:
        rank: number of the process.
        world_size: of all processes.
    """

    rank: int = 0
    world_size: int = 1

    def of(self, number: int) -> range:
        """This process's part of the units `0 .. number - 1`."""
        return range(self.rank, number, self.world_size)


def encode_pairs(
    adapter: BackboneAdapter,
    dataset: PreferenceDataset,
    rows: Any,
    manifest: Manifest,
    folder: Path,
    *,
    share: Share | None = None,
    max_broken: float | None = None,
    num_workers: int = 0,
    show_progress: bool = True,
) -> int:
    """Write what is missing of a cache, or this process's share of it; the first process waits for the others.

    Args:
        adapter: of the model, whose encoders hold their weights.
        dataset: the pairs as tensors.
        rows: the `datasets.Dataset` behind it.
        manifest: what the cache is to be.
        folder: of the cache; another one than this manifest's is refused.
        share: of several processes that write to the same folder.
        max_broken: leave out and list pairs that cannot be read, up to this share of them; None: they are an error.
        num_workers: processes that read media.

    Returns:
        How many pairs of the whole cache are left out; of a process that is not the first, 0.

    Raises:
        ConfigurationError: the folder holds another cache, or something else.
        DatasetError: pairs that cannot be read.
        NumericalError: latents that are not finite.
        StorageError: files that cannot be written.
    """
    share, tolerance = share or Share(), Tolerance(max_broken)
    index = begin(adapter, dataset, rows, manifest, folder, share, tolerance, num_workers)
    adapter.freeze()
    encode_texts(adapter, index, manifest, folder, share, show_progress)
    encode_media(adapter, dataset, index, manifest, folder, share, tolerance, num_workers, show_progress)
    if share.rank != 0:
        return 0
    _wait_for(folder, index.files(manifest.prompts_per_shard), show_progress)
    return len(settle_broken(folder, index, tolerance))


def begin(
    adapter: BackboneAdapter,
    dataset: PreferenceDataset,
    rows: Any,
    manifest: Manifest,
    folder: Path,
    share: Share,
    tolerance: Tolerance,
    num_workers: int = 0,
) -> Index:
    """The index of a cache; the first process writes it where there is none, and the others wait for it."""
    if not is_cache(folder) and share.rank == 0:
        _check_folder(folder)

        def pairs_per_shard(chosen: Shape, rejected: Shape) -> int:
            numbers = sum(math.prod(adapter.latent_shape(*shape)) for shape in (chosen, rejected))
            pair_bytes = numbers * torch_dtype(manifest.dtype).itemsize * (1 + manifest.posterior_std)
            return max(1, manifest.shard_bytes // pair_bytes)

        write_plan(folder, rows, dataset, manifest, pairs_per_shard, tolerance.refuse, num_workers)
        manifest.write(folder)
    while not is_cache(folder):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    check_same(read_manifest(folder), manifest, folder)
    return read_index(folder)


def _wait_for(folder: Path, files: Sequence[Path], show_progress: bool) -> None:
    """Return when all of the files are there."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing and show_progress:
        print(f"Waiting for {len(missing)} files of the other processes.")
    while missing:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        missing = [file for file in missing if not (folder / file).is_file()]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in a manifest."""
    return getattr(torch, name)


def _check_folder(folder: Path) -> None:
    """Raise unless a folder is empty, or holds no more than a plan that was interrupted."""
    if folder.is_dir():
        own = (INDEX, PROMPTS, MANIFEST)
        strange = [file.name for file in folder.iterdir() if not file.name.removeprefix(".").startswith(own)]
        if strange:
            raise ConfigurationError(
                f"The folder {str(folder)!r} is no cache and not empty: it holds {strange[0]!r}. Give a new folder."
            )


# ------------------------------------------------------------------------------------------------------------ text


def encode_texts(
    adapter: BackboneAdapter, index: Index, manifest: Manifest, folder: Path, share: Share, show_progress: bool
) -> None:
    """Write this process's files of embeddings, each prompt's trimmed to its own length."""
    dtype = torch_dtype(manifest.dtype)
    if share.rank == 0 and not (folder / NULL_FILE).is_file():
        write_tensors(folder / NULL_FILE, _stored_row(adapter.null_conditioning(), dtype))
    size = manifest.prompts_per_shard
    mine = share.of(-(-index.num_prompts // size))
    missing = [shard for shard in mine if not (folder / text_file(shard)).is_file()]
    if not missing:
        return
    prompts = pq.read_table(folder / PROMPTS)["prompt"].combine_chunks()
    for shard in tqdm(missing, desc="Prompts", unit="file", disable=not show_progress):
        texts = prompts[shard * size : (shard + 1) * size].to_pylist()
        rows = []
        for start in range(0, len(texts), TEXT_BATCH_SIZE):
            encoded = adapter.encode_prompts(texts[start : start + TEXT_BATCH_SIZE])
            rows.extend(_stored_row(row, dtype) for row in encoded)
        letters = [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for text in texts]
        columns = [ragged(PROMPT, letters), *(ragged(name, [row[name] for row in rows]) for name in rows[0])]
        bad = next((text for text, row in zip(texts, rows, strict=True) if not _is_finite(row.values())), None)
        if bad is not None:
            raise NumericalError(
                f"The embeddings of the prompt {bad!r:.80} are not finite. T5 and others overflow in float16: encode "
                "with `--text_dtype bfloat16` or `float32`."
            )
        write_tensors(folder / text_file(shard), {name: value for part in columns for name, value in part.items()})


def _is_finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _stored_row(row: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """On the CPU, with numbers of no more than the cache's precision."""
    return {
        name: (value.to(dtype) if value.is_floating_point() and value.itemsize > dtype.itemsize else value).cpu()
        for name, value in row.items()
    }


# ----------------------------------------------------------------------------------------------------------- media


class _Batches(torch.utils.data.Sampler):
    """The pairs of some shards, in batches that end where a shard does."""

    def __init__(self, index: Index, shards: Sequence[int], batch_size: int):
        self.index, self.shards, self.batch_size = index, shards, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for pairs in self.index.pairs_by_shard(self.shards):
            for start in range(0, len(pairs), self.batch_size):
                yield pairs[start : start + self.batch_size].tolist()


def encode_media(
    adapter: BackboneAdapter,
    dataset: PreferenceDataset,
    index: Index,
    manifest: Manifest,
    folder: Path,
    share: Share,
    tolerance: Tolerance,
    num_workers: int,
    show_progress: bool,
) -> None:
    """Write this process's files of latents."""
    mine = share.of(index.num_shards)
    missing = [shard for shard in mine if not (folder / latents_file(shard)).is_file()]
    if not missing:
        return
    sizes = np.bincount(index.shard, minlength=index.num_shards)
    loader = DataLoader(
        Attempts(dataset, np.array(manifest.shapes)[np.stack(divmod(index.bucket, len(manifest.shapes)), axis=1)]),
        batch_sampler=_Batches(index, missing, adapter.vae_slice_size),
        collate_fn=Attempted.of,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    total, todo = int(sizes[list(mine)].sum()), int(sizes[missing].sum())
    batches = iter(loader)
    with tqdm(
        total=total, initial=total - todo, desc="Pairs", unit="pair", smoothing=0.05, disable=not show_progress
    ) as bar:
        for shard in missing:
            parts, broken, done = [], [], 0
            while done < sizes[shard]:
                attempted = next(batches)
                _count(tolerance, attempted, shard, folder)
                broken += attempted.broken
                if attempted.batch is not None:
                    parts.append(_encode_batch(adapter, attempted.batch, manifest))
                done += attempted.num_pairs
                bar.update(attempted.num_pairs)
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
            write_broken(folder, shard, broken)
            write_tensors(folder / latents_file(shard), tensors)


def _count(tolerance: Tolerance, attempted: Attempted, shard: int, folder: Path) -> None:
    """Raise what a batch gives cause for; what lacks pairs that may be whole after all is then encoded anew."""
    try:
        tolerance.count(attempted, shard)
    except DatasetError:
        forget_doubtful(folder, tolerance.doubtful_shards)
        raise


def _encode_batch(adapter: BackboneAdapter, batch: dict[str, Any], manifest: Manifest) -> dict[str, torch.Tensor]:
    dtype = torch_dtype(manifest.dtype)
    encoded = {name: batch[name] for name in NUMBERS if name in batch}
    for arm in ("chosen", "rejected"):
        pixels = batch[f"{arm}_pixels"]
        if manifest.posterior_std:
            mean, std = adapter.encode_posterior(pixels)
            encoded |= {arm: mean.to(dtype).cpu(), f"{arm}_std": std.to(dtype).cpu()}
        else:
            encoded[arm] = adapter.encode_media(pixels).to(dtype).cpu()
    if not _is_finite(encoded.values()):
        raise NumericalError(
            f"The latents of one of the pairs {batch['pair_numbers']} are not finite. VAEs overflow in half "
            "precision: encode with `--vae_dtype float32`."
        )
    return encoded
