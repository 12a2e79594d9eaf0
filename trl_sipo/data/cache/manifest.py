# SPDX-License-Identifier: Apache-2.0
"""`cache.json`: what a cache holds, by which model and how it was made, and whether that is what is wanted."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trl_sipo.data.cache.shards import write_whole
from trl_sipo.data.formats import PreferenceFormat, select_pairs, undecoded
from trl_sipo.data.stored import path_name
from trl_sipo.data.video import ClipSampler
from trl_sipo.errors import ConfigurationError, DatasetError

MANIFEST = "cache.json"
FORMAT = 1
NUMBERS = ("frame_rate", "label")  # what there may be beside the latents of each pair
# How media become tensors. Another word here for another way, so that caches of the two are told apart.
PREPROCESSING = "first frames; cover, crop at the centre; Lanczos; [-1, 1]"

_DTYPES = ("bfloat16", "float32", "float16")
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "trl-sipo")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack")
# Written anew by whoever saves a tokenizer, with names of folders and versions; the vocabulary is elsewhere.
_NOT_COUNTED = {"tokenizer_config.json", "special_tokens_map.json"}
_ENCODERS = ("vae", "text_encoder", "tokenizer")  # how the names of the components that count begin
_NOT_OF_CONTENT = ("model", "versions", "num_broken")
_SAMPLED_BYTES, _NUM_SAMPLES = 4096, 64
_ROWS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Manifest:
    """All that decides what is in a cache, and where.

    Args:
        model: hub id or path that the model was loaded from.
        revision: of a hub id.
        variant: of the weight files.
        pipeline_class: of the model.
        encoders: fingerprint of its VAE, text encoders and tokenizers; None: not known.
        num_pairs: pairs in the cache.
        data: fingerprint of the pairs.
        split: of the dataset that was encoded.
        soft_labels: labels are stored, as probabilities.
        size: height and width in pixels; with buckets, that of their budget of pixels.
        buckets: the sizes that media were brought to, each to that of the nearest shape; None: all to `size`.
        num_frames: of clips; 1 for images.
        frame_buckets: all numbers of frames there may be, each video taking the largest it can; None: `num_frames`.
        frame_rate: at which the clips were taken; None: that of each video.
        dtype: of the latents and of embeddings.
        text_dtype, vae_dtype: of the weights that encoded.
        posterior_std: the standard deviation of the VAE's posterior is stored too.
        shard_bytes: of latents per file, about.
        prompts_per_shard: prompts per file.
        preprocessing: how media became tensors.
        versions: of the libraries, for the record: other versions are no mismatch.
        num_broken: of the pairs, those that were left out since they cannot be read; known when all is encoded.
    """

    model: str
    pipeline_class: str
    num_pairs: int
    data: str
    size: tuple[int, int]
    split: str = "train"
    revision: str | None = None
    variant: str | None = None
    encoders: str | None = None
    soft_labels: bool = False
    buckets: tuple[tuple[int, int], ...] | None = None
    num_frames: int = 1
    frame_buckets: tuple[int, ...] | None = None
    frame_rate: float | None = None
    dtype: str = "bfloat16"
    text_dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    posterior_std: bool = False
    shard_bytes: int = 2**28
    prompts_per_shard: int = 256
    preprocessing: str = PREPROCESSING
    format: int = FORMAT
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in _PACKAGES})
    num_broken: int = 0

    def write(self, folder: Path) -> None:
        """Write `cache.json`, whole or not at all."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))

    def clip_sampler(self) -> ClipSampler | None:
        """Which frames of videos are taken; None: the media are images."""
        shortest, *longer = self.frame_buckets or (self.num_frames,)
        if shortest == 1:
            return None
        return ClipSampler(shortest, frame_rate=self.frame_rate, longer=tuple(longer))

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Height, width and number of frames of all media there may be."""
        return [
            (*size, length)
            for size in self.buckets or (self.size,)
            for length in self.frame_buckets or (self.num_frames,)
        ]

    @property
    def fingerprint(self) -> str:
        """Of the contents, whatever wrote them, and whichever of the pairs were broken."""
        content = {name: value for name, value in asdict(self).items() if name not in _NOT_OF_CONTENT}
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def is_cache(folder: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that `trl-sipo encode` has begun."""
    return os.path.isfile(Path(folder, MANIFEST))  # unlike the method, false of a path that is too long


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a cache.

    Raises:
        DatasetError: it is no manifest, or one of another version of this package.
    """
    path = Path(folder, MANIFEST)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == FORMAT:
            buckets = content["buckets"] and tuple(tuple(size) for size in content["buckets"])
            lengths = content["frame_buckets"] and tuple(content["frame_buckets"])
            tuples = {"size": tuple(content["size"]), "buckets": buckets, "frame_buckets": lengths}
            return _checked(Manifest(**{**content, **tuples}))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{str(path)!r} is no manifest of a cache: {type(error).__name__}: {error}") from error
    raise DatasetError(
        f"the cache {os.fspath(folder)!r} has format {content['format']}, and this version of trl-sipo reads "
        f"{FORMAT}: encode the data anew, or use the version that wrote it ({content.get('versions')})"
    )


def _checked(manifest: Manifest) -> Manifest:
    """The manifest, if its numbers and names can be those of a cache."""
    numbers = [manifest.num_pairs, manifest.prompts_per_shard, manifest.shard_bytes]
    numbers += [number for shape in manifest.shapes for number in shape]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"a number that must be a positive integer is not, of {numbers}")
    for name in (manifest.dtype, manifest.text_dtype, manifest.vae_dtype):
        if name not in _DTYPES:
            raise ValueError(f"{name!r} is none of {', '.join(_DTYPES)}")
    if any(len(size) != 2 for size in (manifest.size, *(manifest.buckets or ()))):
        raise ValueError("a size is a height and a width")
    texts = (manifest.split, manifest.model, manifest.pipeline_class, manifest.data, manifest.preprocessing)
    optional = (manifest.revision, manifest.variant, manifest.encoders)
    if not all(isinstance(text, str) for text in (*texts, *(text for text in optional if text is not None))):
        raise TypeError("what must be a text is none")
    if type(manifest.num_broken) is not int:
        raise TypeError("`num_broken` must be a number")
    return manifest


def check_same(found: Manifest, wanted: Manifest, folder: Path) -> None:
    """Raise [`ConfigurationError`] unless a cache that was begun is the one that is to be written.

    It names the first setting that differs, with both values.
    """
    is_same = found.encoders == wanted.encoders and (found.encoders is not None or found.model == wanted.model)
    if not is_same or found.pipeline_class != wanted.pipeline_class:
        raise ConfigurationError(_mismatch(folder, "the model", _model_of(found), _model_of(wanted)))
    for name, value in asdict(wanted).items():
        # The name of a model says nothing when its encoders are the same.
        if name not in (*_NOT_OF_CONTENT, "encoders") and getattr(found, name) != value:
            what = {"data": "the data (a fingerprint)"}.get(name, f"`{name}`")
            raise ConfigurationError(_mismatch(folder, what, getattr(found, name), value))


def _model_of(manifest: Manifest) -> str:
    revision = "" if manifest.revision is None else f" at revision {manifest.revision}"
    encoders = "" if manifest.encoders is None else f", encoders {manifest.encoders}"
    return f"{manifest.pipeline_class} {manifest.model}{revision}{encoders}"


def _mismatch(folder: Path, what: str, found: object, wanted: object) -> str:
    return (
        f"The cache {str(folder)!r} was made with another value of {what}: it has {found!r}, now it is {wanted!r}. "
        "Give the same settings to go on with it, another folder for a second cache, or remove the folder to begin "
        "anew."
    )


# --------------------------------------------------------------------------------------------------- fingerprints


def encoders_fingerprint(name_or_path: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Of a model's VAE, text encoders and tokenizers, without reading all of their weights.

    Args:
        name_or_path: a local folder, or a hub id, of which the commit counts.
        revision: of the hub id.

    Returns:
        None: neither a folder nor a model that the hub's cache knows.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return _hub_fingerprint(os.fspath(name_or_path), revision)
    digest = hashlib.blake2b(digest_size=8)
    parts = [part for part in folder.iterdir() if part.name.startswith(_ENCODERS)]
    files = (file for part in parts for file in part.rglob("*") if file.is_file() and file.name not in _NOT_COUNTED)
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        for content in file_samples(path) if path.suffix in _WEIGHT_SUFFIXES else [path.read_bytes()]:
            digest.update(content)
    return digest.hexdigest()


def _hub_fingerprint(name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json", revision=revision)
    return f"{name}@{Path(found).parent.name}" if isinstance(found, str) else None


def file_samples(path: Path) -> Iterator[bytes]:
    """A file's size and bytes from all over it: no training leaves all of these as they were."""
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        for number in range(_NUM_SAMPLES):
            file.seek(number * max(size - _SAMPLED_BYTES, 0) // (_NUM_SAMPLES - 1))
            yield file.read(_SAMPLED_BYTES)
            if size <= _SAMPLED_BYTES:
                break


def data_fingerprint(dataset: datasets.Dataset, fmt: PreferenceFormat, num_pairs: int) -> str:
    """Of the first pairs of a dataset: prompts, labels, and the sizes of stored media, whose contents are not read.

    Of files, the names count, with that of their folder: where the data lies does not, so that it may move.
    """
    rows = undecoded(dataset, fmt).with_format("arrow")
    kept = select_pairs(dataset, fmt).kept[:num_pairs]
    digest = hashlib.blake2b(repr((fmt.name, fmt.soft_labels)).encode(), digest_size=8)
    digest.update(kept.tobytes())
    for start in range(0, int(kept[-1]) + 1, _ROWS_AT_A_TIME):
        table = rows[start : start + _ROWS_AT_A_TIME]  # rows in one piece are not copied
        inside = kept[np.searchsorted(kept, start) : np.searchsorted(kept, start + _ROWS_AT_A_TIME)] - start
        for column in fmt.columns:
            read = _sizes if column in fmt.media_columns else pa.Array.to_pylist
            values = [value for chunk in table[column].chunks for value in read(chunk)]
            digest.update(repr([values[row] for row in inside]).encode())
    return digest.hexdigest()


def _sizes(column: pa.Array) -> list[Any]:
    """What tells media from one another without reading them: their number of bytes, or the names of their files."""
    kind = column.type
    if pa.types.is_struct(kind):
        sizes, paths = _sizes(column.field("bytes")), _sizes(column.field("path"))
        return [path if size is None else size for size, path in zip(sizes, paths, strict=True)]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.binary_length(column).to_pylist()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [None if path is None else path_name(path) for path in column.to_pylist()]
    if pa.types.is_list(kind):
        lengths = pc.list_value_length(column).to_pylist()
        if pa.types.is_list(kind.value_type) or pa.types.is_primitive(kind.value_type):
            return lengths  # an array, whose numbers are many
        frames = iter(_sizes(column.flatten()))
        return [None if length is None else list(itertools.islice(frames, length)) for length in lengths]
    return [None if pa.types.is_null(kind) else str(kind)] * len(column)
