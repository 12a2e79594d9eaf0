# SPDX-License-Identifier: Apache-2.0
"""Damage to the folder that `trl-sipo encode` wrote. A case changes the folder."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from tests.hostile.cases import Case

_LATENTS, _TEXT = Path("latents", "00000.safetensors"), Path("text", "00000.safetensors")
_NULL = Path("text", "null.safetensors")


def _tensors(file: Path, change: Any) -> Any:
    """Change the tensors of a file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return damage


def _header(change: Any, file: Path = _LATENTS) -> Any:
    """Change the header of a file, as bytes."""

    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = change(content[8 : 8 + length])
        (folder / file).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])

    return damage


def _larger(header: bytes) -> bytes:
    """As if each tensor had a row more than there are bytes for."""
    entries = json.loads(header)
    for entry in entries.values():
        entry["shape"][0] += 1
    return json.dumps(entries).encode()


def _uncountable(header: bytes) -> bytes:
    """No numbers, in a shape beyond 64 bits."""
    name = next(iter(json.loads(header)))
    return json.dumps({name: {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}}).encode()


def _cut(folder: Path) -> None:
    content = (folder / _LATENTS).read_bytes()
    (folder / _LATENTS).write_bytes(content[:-100])


def _manifest(**values: Any) -> Any:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "cache.json").read_text())
        (folder / "cache.json").write_text(json.dumps({**content, **values}))

    return damage


def _index(column: str, value: int) -> Any:
    def damage(folder: Path) -> None:
        table = pq.read_table(folder / "index.parquet")
        values = table[column].to_numpy().copy()
        values[0] = value
        place = table.column_names.index(column)
        pq.write_table(table.set_column(place, column, [values.astype(np.int32)]), folder / "index.parquet")

    return damage


def _later_shard(change: Any) -> Any:
    """Move the second pair to a file of its own, and change the tensors there."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / _LATENTS)
        change(tensors)
        save_file(tensors, folder / "latents" / "00001.safetensors")
        table = pq.read_table(folder / "index.parquet")
        place = table.column_names.index("shard")
        pq.write_table(table.set_column(place, "shard", [np.array([0, 1], np.int32)]), folder / "index.parquet")

    return damage


def _cropped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["rejected"] = tensors["rejected"][..., :1].contiguous()


def _with_labels(tensors: dict[str, torch.Tensor]) -> None:
    tensors["label"] = torch.ones(len(tensors["chosen"]))


def _in_double_precision(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name].double()})


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    """Embeddings of half the width and twice the length."""
    shapes = tensors["prompt_embeds.shapes"]
    tensors["prompt_embeds.shapes"] = shapes * torch.tensor([2, 1]) // torch.tensor([1, 2])


def _flat(tensors: dict[str, torch.Tensor]) -> None:
    tensors["prompt_embeds.shapes"] = tensors["prompt_embeds.shapes"].prod(1, keepdim=True)


def _first(name: str, value: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return change


def _as_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["chosen"] = tensors["chosen"].to(torch.int16)


def _write(file: str, content: bytes) -> Any:
    return lambda folder: (folder / file).write_bytes(content)


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "latents" / "00000.bad_rows.jsonl")


_BAD_ROWS = "latents/00000.bad_rows.jsonl"
_ROWS_OF_WORDS = b'{"pair": "first", "row": 0, "key": "0", "reason": ""}'
_PRECISION = "is of torch.float64, and the manifest says bfloat16"
_OTHER, _NULLS = "unlike those of 00000", "than that of the empty prompt"

CACHES = [
    Case("NaN among latents", _tensors(_LATENTS, _first("chosen", torch.nan)), "holds numbers that are not finite"),
    Case(
        "infinity among embeddings",
        _tensors(_TEXT, _first("prompt_embeds", torch.inf)),
        "holds numbers that are not finite",
    ),
    Case("latents that are integers", _tensors(_LATENTS, _as_integers), "its 'chosen' is of torch.int16"),
    Case(
        "latents of another precision than the manifest's",
        _tensors(_LATENTS, _in_double_precision("chosen")),
        _PRECISION,
    ),
    Case("latents of another shape in a later file", _later_shard(_cropped), _OTHER),
    Case("latents of another precision in a later file", _later_shard(_in_double_precision("rejected")), _PRECISION),
    Case("labels in a later file alone", _later_shard(_with_labels), _OTHER),
    Case("embeddings of another width than the empty prompt's", _tensors(_TEXT, _narrow), _NULLS),
    Case("embeddings without a width", _tensors(_TEXT, _flat), _NULLS),
    Case(
        "embeddings of another precision than the empty prompt's",
        _tensors(_TEXT, _in_double_precision("prompt_embeds")),
        _NULLS,
    ),
    Case("one arm alone", _tensors(_LATENTS, lambda tensors: tensors.pop("rejected")), "it has no 'rejected'"),
    Case("a file that is cut off", _cut, "it ends after"),
    Case(
        "a header that is cut off", _header(lambda header: header[: len(header) // 2]), "is damaged (JSONDecodeError"
    ),
    Case("a header that is 100,000 lists deep", _header(lambda header: b"[" * 100_000), "is damaged (RecursionError"),
    Case("a header with other shapes than bytes", _header(_larger), "bytes for"),
    Case("a length of the header beyond the file", _write(str(_LATENTS), b"\xff" * 64), "it has no header"),
    Case(
        "prompts that begin beyond their end",
        _tensors(_TEXT, _first("utf8.starts", 10**6)),
        "is damaged (row 0 of 'utf8'",
    ),
    Case("prompts that are no UTF-8", _tensors(_TEXT, _first("utf8", 255)), "of its prompts is no text"),
    Case("an index with a row that is not there", _index("row", 10**6), "no row 1000000"),
    Case("an index with a file that cannot be", _index("shard", 2**30), "holds what it cannot"),
    Case("an index with a prompt that is not there", _index("prompt", 10**6), "holds what it cannot"),
    Case("an index that is no Parquet", _write("index.parquet", b"PAR1" * 99), "cannot be read"),
    Case("a manifest with a name of PyTorch that is no dtype", _manifest(dtype="load"), "is no manifest of a cache"),
    Case("a manifest with numbers that cannot be", _manifest(prompts_per_shard=0), "is no manifest of a cache"),
    Case("a manifest with a setting that is not known", _manifest(command="rm"), "is no manifest of a cache"),
    Case("a manifest with a size of one side", _manifest(size=[16]), "is no manifest of a cache"),
    Case("a manifest with a number for its encoders", _manifest(encoders=5), "is no manifest of a cache"),
    Case("a list of bad rows that is no JSON", _write(_BAD_ROWS, b"\x80\x04"), "is no list of bad rows"),
    Case("a list of bad rows of other things", _write(_BAD_ROWS, b'{"command": "rm"}'), "is no list of bad rows"),
    Case("a list of bad rows of words", _write(_BAD_ROWS, _ROWS_OF_WORDS), "is no list of bad rows"),
    Case("a named pipe for a list of bad rows", _pipe, "is no list of bad rows"),
    Case("a shape with more rows than numbers can count", _header(_uncountable, _NULL), "is damaged ("),
    Case("a manifest that is no JSON", _write("cache.json", b"\x80\x04"), "is no manifest of a cache"),
]
