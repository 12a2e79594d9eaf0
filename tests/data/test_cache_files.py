# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and what is read out of them."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from trl_sipo.data.cache import shards
from trl_sipo.data.cache.manifest import (
    MANIFEST,
    Manifest,
    check_same,
    data_fingerprint,
    encoders_fingerprint,
    read_manifest,
)
from trl_sipo.data.cache.shards import OpenFiles, TensorFile, ragged, write_tensors, write_whole
from trl_sipo.data.formats import detect_format
from trl_sipo.errors import ConfigurationError, DatasetError

TENSORS = {
    "bfloat16": torch.randn(5, 3, 2).bfloat16(),
    "float32": torch.randn(4, 1),
    "mask": torch.tensor([[True, False], [False, True]]),
    "integers": torch.arange(6).reshape(3, 2),
    "empty": torch.zeros(0, 4),
}


def test_rows_and_tensors_are_those_that_were_written(tmp_path):
    write_tensors(tmp_path / "a.safetensors", TENSORS)
    file = TensorFile(tmp_path / "a.safetensors")
    assert sorted(file.names) == sorted(TENSORS)
    for name, value in TENSORS.items():
        read = file.tensor(name)
        assert read.dtype == value.dtype and torch.equal(read, value) and file.shape(name) == value.shape
        for index in range(len(value)):
            assert torch.equal(file.row(name, index), value[index])


def test_tensors_of_several_shapes_lie_on_top_of_one_another(tmp_path):
    rows = [torch.randn(3, 2).bfloat16(), torch.randn(1, 2).bfloat16(), torch.zeros(0, 2).bfloat16(), torch.ones(4, 2)]
    rows[3] = rows[3].bfloat16()
    scalars = [torch.tensor(1), torch.tensor(2)]
    write_tensors(tmp_path / "a.safetensors", {**ragged("embeds", rows), **ragged("number", scalars)})
    file = TensorFile(tmp_path / "a.safetensors")
    for index, row in enumerate(rows):
        assert torch.equal(file.ragged_row("embeds", index), row)
    assert [file.ragged_row("number", index).item() for index in range(2)] == [1, 2]


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path):
    value = torch.randn(3, 4).T
    write_tensors(tmp_path / "a.safetensors", {"value": value})
    assert torch.equal(TensorFile(tmp_path / "a.safetensors").row("value", 2), value[2])


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda temporary: temporary.write_bytes(b"first"))

    def half(temporary):
        temporary.write_bytes(b"sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "Ctrl-C tidies up"
    (tmp_path / ".file.123.tmp").write_bytes(b"as a kill leaves it")
    write_whole(path, lambda temporary: temporary.write_bytes(b"second"))
    assert path.read_bytes() == b"second"
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "what was torn is gone"


def test_a_file_has_its_name_only_when_it_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(shards.os, "fsync", lambda descriptor: events.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(shards.os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    write_whole(tmp_path / "file", lambda temporary: temporary.write_bytes(b"content"))
    assert events == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_damaged_file_is_named(kept, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DatasetError, match="a.safetensors' is damaged .*run `trl-sipo encode` again"):
        TensorFile(path)
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        TensorFile(tmp_path / "other")


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 3)
    for number in range(10):
        write_tensors(tmp_path / str(number), {"number": torch.tensor([number])})
    files = OpenFiles()
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(10), *range(10)]:
        assert files[tmp_path / str(number)].tensor("number").item() == number
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    copy = pickle.loads(pickle.dumps(files))  # as for a spawned worker
    assert copy[tmp_path / "4"].tensor("number").item() == 4


def test_a_manifest_reads_as_it_was_written(tmp_path):
    manifest = Manifest(
        "model", "Pipeline", 3, "data", (64, 32), buckets=((64, 32), (32, 64)), num_frames=9, frame_rate=12.0
    )
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest
    content = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(DatasetError, match="has format 99, and this version of trl-sipo reads 1"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(DatasetError, match="is no manifest"):
        read_manifest(tmp_path)


def test_encoders_are_told_apart_by_weights_vocabulary_and_configuration(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "unet").mkdir()
    weights, config = tmp_path / "vae" / "model.safetensors", tmp_path / "vae" / "config.json"
    weights.write_bytes(bytes(10_000_000))
    config.write_text("{}")
    first = encoders_fingerprint(tmp_path)
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"trained")
    assert encoders_fingerprint(tmp_path) == first, "the denoiser does not count"
    config.write_text("{ }")
    second = encoders_fingerprint(tmp_path)
    trained = bytearray(10_000_000)
    trained[::1000] = b"\1" * 10_000
    weights.write_bytes(trained)
    assert len({first, second, encoders_fingerprint(tmp_path)}) == 3


def fingerprint(**columns):
    """Of the data of a cache, from columns of one row."""
    dataset = Dataset.from_dict({"prompt": ["a cat"], **{name: [value] for name, value in columns.items()}})
    return data_fingerprint(dataset, detect_format(dataset.column_names), 1)


def in_folder(folder, *names):
    return [f"/{folder}/{name}.png" for name in names]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (b"1234", b"12"),
        ({"bytes": b"1234", "path": "0.png"}, {"bytes": b"12", "path": "0.png"}),
        ("/data/chosen/0.png", "/data/rejected/0.png"),
        ({"bytes": None, "path": "/data/chosen/0.png"}, {"bytes": None, "path": "/data/rejected/0.png"}),
        (in_folder("x", "0", "1"), in_folder("y", "0", "1")),
        (in_folder("x", "0", "1"), in_folder("x", "1", "0")),
        ([{"bytes": b"1234", "path": None}], [{"bytes": b"12", "path": None}]),
        ("/data/chosen/0.png", None),
        (in_folder("x", "0"), None),
        (b"1234", None),
    ],
)
def test_the_fingerprint_of_data_tells_the_arms_apart(chosen, rejected):
    assert fingerprint(chosen=chosen, rejected=rejected) != fingerprint(chosen=rejected, rejected=chosen)


def test_the_fingerprint_of_data_stays_when_a_folder_moves():
    first, second = (
        fingerprint(chosen=f"{root}/chosen/0.png", rejected=f"{root}/rejected/0.png") for root in ("/a", "/b/c")
    )
    assert first == second


def test_models_of_which_nothing_is_known_are_told_by_their_names(tmp_path):
    known = Manifest(model="a", pipeline_class="P", num_pairs=1, data="x", size=(8, 8), encoders="e")
    check_same(known, replace(known, model="b"), tmp_path)
    with pytest.raises(ConfigurationError, match="another value of the model: it has 'P a', now it is 'P b'"):
        check_same(replace(known, encoders=None), replace(known, model="b", encoders=None), tmp_path)
