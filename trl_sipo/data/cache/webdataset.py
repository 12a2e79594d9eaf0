# SPDX-License-Identifier: Apache-2.0
"""A cache as tar files, the form in which object storage is read from one end to the other (WebDataset)."""

import io
import json
import tarfile
from pathlib import Path

from safetensors.torch import save
from tqdm.auto import tqdm

from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.cache.shards import write_whole
from trl_sipo.errors import ConfigurationError


def export_webdataset(pairs: CachedPairs, folder: Path, pairs_per_file: int = 1000) -> int:
    """Write the pairs of a cache, in their order, as `00000.tar` and so on.

    A sample is `<number>.latents.safetensors` (`chosen`, `rejected`, and their `_std` where stored; in the cache's
    precision), `<number>.text.safetensors` (the embeddings of the prompt) and `<number>.json` (prompt, frame rate,
    label). Prompts are repeated with every pair: a sample has to stand alone.

    Returns:
        The number of files.

    Raises:
        ConfigurationError: the folder is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigurationError(f"The folder {str(folder)!r} is not empty: give a new one for the export.")
    starts = range(0, len(pairs), pairs_per_file)
    for number, start in enumerate(tqdm(starts, desc="Export", unit="file")):
        stop = min(start + pairs_per_file, len(pairs))
        write_whole(folder / f"{number:05d}.tar", lambda path, start=start, stop=stop: _tar(pairs, start, stop, path))
    return len(starts)


def _tar(pairs: CachedPairs, start: int, stop: int, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for index in range(start, stop):
            item = pairs[index]
            arms = [key for key in item if key.startswith(("chosen", "rejected"))]
            latents = {key.removesuffix("_latents"): item[key].to(pairs.dtype) for key in arms}
            about = {key: item[key] for key in ("prompt", "frame_rate", "label", "pair_index") if key in item}
            _add(tar, f"{index:09d}.json", json.dumps(about).encode())
            _add(tar, f"{index:09d}.latents.safetensors", save(latents))
            _add(tar, f"{index:09d}.text.safetensors", save(item["conditioning"]))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
