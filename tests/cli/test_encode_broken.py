# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo encode` where something is wrong with pairs, the disk or the file system: nothing encoded is lost."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from tests.adapters.backbone_cases import CASES
from tests.cli.test_encode import ROOT, SIZE, SMALL_FILES, contents, start
from tests.data.clips import damaged, write_video
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.cached import Encoded, saved
from tests.trainer.media import pairs_for
from tests.trainer.runs import picture
from trl_sipo.adapters.stable_diffusion import StableDiffusionAdapter
from trl_sipo.cli.main import main
from trl_sipo.data.cache import attempts
from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.cache.manifest import read_manifest
from trl_sipo.data.cache.plan import read_index, write_index
from trl_sipo.errors import ConfigurationError, DatasetError, MediaAccessError, StorageError

NUM_PAIRS = 42
# A file of latents has four pairs: the fourth file lacks all of them. Row 3 has no prompt.
BROKEN = {3: None, 8: b"no image", 12: "missing", 13: b"", 14: "truncated", 15: "missing", 41: "truncated"}
FLAGS = (*SMALL_FILES, "--skip_broken", "--max_broken", "0.5")


def write_pairs(folder, count=NUM_PAIRS, damage=BROKEN, size=(32, 32)):
    """Image files and a table of them, some of which are broken."""
    (folder / "media").mkdir(parents=True)
    rows = []
    for number in range(count):
        paths = {arm: f"media/{number}_{arm}.png" for arm in ("chosen", "rejected")}
        for k, path in enumerate(paths.values()):
            picture(2 * number + k).resize(size).save(folder / path)
        harm, file = damage.get(number, ""), folder / paths["rejected"]
        if harm == "missing":
            file.unlink()
        elif harm == "truncated":
            file.write_bytes(file.read_bytes()[:-600])
        elif isinstance(harm, bytes):
            file.write_bytes(harm)
        rows.append({"prompt": f"prompt {number % 21}" if harm is not None else " ", **paths})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model and 42 pairs of which 7 are broken, and the cache of an undisturbed run that leaves them out."""
    folder = tmp_path_factory.mktemp("broken")
    tiny_stable_diffusion().save_pretrained(folder / "model")
    encoded = Encoded(folder / "model", write_pairs(folder / "pairs"), folder / "cache", SIZE)
    encoded.encode(*FLAGS)
    return encoded


def listed(folder):
    return [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]


def test_broken_pairs_are_left_out_and_listed_as_the_check_lists_them(material, tmp_path, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        pairs = CachedPairs(material.cache)
    assert "is without 7 pairs that could not be read" in caplog.text
    assert len(pairs) == NUM_PAIRS - 7 and pairs.num_broken == read_manifest(material.cache).num_broken == 7
    assert [row["row"] for row in listed(material.cache)] == list(BROKEN)
    reasons = [row["reason"] for row in listed(material.cache)]
    assert reasons[0] == "column 'prompt': the prompt is empty" and reasons[1].startswith("the rejected image: not an")
    assert main(["data", "check", str(material.pairs), "--output", str(tmp_path)]) == 0
    assert [(row["row"], row["key"]) for row in listed(tmp_path)] == [
        (row["row"], row["key"]) for row in listed(material.cache)
    ]
    kept = [number for number in range(NUM_PAIRS) if number not in BROKEN]
    assert [pairs[i]["prompt"] for i in range(len(pairs))] == [f"prompt {number % 21}" for number in kept]
    # The same as data without the listed rows.
    skipping = ("--skip_rows", material.cache / "bad_rows.jsonl")
    other = CachedPairs(material.encode(*SMALL_FILES, *skipping, cache=tmp_path / "cache"))
    assert len(other) == len(pairs) and other.num_broken == 0
    for index in (0, 5, 20, 34):
        for arm in ("chosen_latents", "rejected_latents"):
            torch.testing.assert_close(pairs[index][arm], other[index][arm], rtol=0, atol=1e-5)


def test_a_run_that_stopped_at_a_broken_pair_goes_on_with_the_flag(material, tmp_path, capsys):
    argv = ["encode", *material.argv(tmp_path / "cache", *SMALL_FILES), "--num_workers", "2"]
    assert main(argv) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("trl-sipo encode: row 3, column 'prompt'") and "`--skip_broken`" in message
    assert not (tmp_path / "cache").exists()
    sound = write_pairs(tmp_path / "pairs", damage={8: b"no image", 30: "missing"})
    encoded = Encoded(material.model, sound, tmp_path / "cache", SIZE)
    argv = ["encode", *encoded.argv(None, *SMALL_FILES), "--num_workers", "2"]
    assert main(argv) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("trl-sipo encode: row 8, the rejected image: not an image") and "worker" not in message
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(before) > 2
    assert main([*argv, "--skip_broken"]) == 0
    assert "40 of 42 pairs are encoded; 2 cannot be read, and are listed in" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == moment for file, moment in before.items())
    encoded.encode(*SMALL_FILES, "--skip_broken", cache=tmp_path / "undisturbed")
    assert contents(tmp_path / "cache") == contents(tmp_path / "undisturbed")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    assert main(argv) == 0, "what is encoded needs no flag any more"
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}


def test_kills_interrupts_and_processes_change_nothing(material, tmp_path):
    killed = ("kill", 4, 0, *material.argv(tmp_path / "killed", *FLAGS))
    shared = ("share", 3, *material.argv(tmp_path / "shared", *FLAGS))
    interrupted = ("interrupt", *material.argv(tmp_path / "interrupted", *FLAGS, "--num_workers", "2"))
    printed = start(*killed, "then", *shared, "then", *interrupted)
    assert "status 130" in printed and "Traceback" not in printed
    assert "encode: interrupted. What is encoded is kept: run the same command again to go on." in printed
    assert "latents/00010.safetensors" not in contents(tmp_path / "interrupted")
    material.encode(*FLAGS, cache=tmp_path / "interrupted")
    for name in ("killed", "shared", "interrupted"):
        assert contents(tmp_path / name) == contents(material.cache), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_is_killed_many_times_ends_in_the_same_bytes(seed, material, tmp_path):
    start("kill", 25, seed, *material.argv(tmp_path / "cache", *FLAGS))
    assert contents(tmp_path / "cache") == contents(material.cache)


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes(material, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = material.argv(tmp_path / "cache", *FLAGS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, "-m", "trl_sipo.scripts.encode", *argv], env=environment, check=True, timeout=500)
    assert contents(tmp_path / "cache") == contents(material.cache)


@pytest.mark.slow
def test_videos_of_several_lengths_that_are_killed_many_times(tmp_path):
    """The first four pairs have 5 frames, the others 9; three videos are broken, one is too short."""
    case = next(case for case in CASES if case.name == "wan21")
    long = replace(case, media_shape=(3, 9, *case.media_shape[2:]))
    encoded = saved(case, tmp_path, 4)
    rows = [*pairs_for(case, tmp_path / "short", 4), *pairs_for(long, tmp_path / "long", 8)]
    datasets.Dataset.from_list(rows).to_parquet(encoded.pairs)
    for number in (1, 6):
        damaged(Path(rows[number]["rejected"]), 0.1, 0.9)
    Path(rows[7]["chosen"]).unlink()
    write_video(Path(rows[9]["chosen"]), 2, rate=12)
    options = ("--frame_buckets", "5", "9", "--shard_mb", "0.003", "--skip_broken", "--max_broken", "0.5")
    encoded.encode(*options)
    assert [row["row"] for row in listed(encoded.cache)] == [1, 6, 7, 9]
    printed = start("kill", 40, 0, *encoded.argv(tmp_path / "killed", *options))
    assert int(re.search(r"partial (\d+)", printed)[1]) > 5
    assert contents(tmp_path / "killed") == contents(encoded.cache)


def test_workers_and_batch_sizes_change_nothing(material, tmp_path, monkeypatch):
    material.encode(*FLAGS, "--num_workers", 2, cache=tmp_path / "workers")
    assert contents(tmp_path / "workers") == contents(material.cache)
    monkeypatch.setattr(StableDiffusionAdapter, "vae_slice_size", 1)
    material.encode(*FLAGS, cache=tmp_path / "single")
    for name, content in contents(tmp_path / "single").items():
        assert content == contents(material.cache)[name] or name.startswith("latents")
    pairs, single = CachedPairs(material.cache), CachedPairs(tmp_path / "single")
    for index in range(len(pairs)):
        torch.testing.assert_close(pairs[index]["chosen_latents"], single[index]["chosen_latents"], rtol=0, atol=1e-5)


def test_without_broken_pairs_the_flag_changes_nothing(material, tmp_path):
    encoded = Encoded(material.model, write_pairs(tmp_path / "pairs", 9, {}), tmp_path / "cache", SIZE)
    assert contents(encoded.encode(*SMALL_FILES)) == contents(encoded.encode(*FLAGS, cache=tmp_path / "flag"))


def test_a_cache_whose_index_is_that_of_the_plan_is_not_complete(material, tmp_path):
    """As a kill leaves it before the last files are written."""
    cache = tmp_path / "cache"
    shutil.copytree(material.cache, cache)
    planned = read_index(cache).without([])
    write_index(cache, planned)
    with pytest.raises(DatasetError, match="its index does not know yet which pairs were left out"):
        CachedPairs(cache)
    material.encode(*FLAGS, cache=cache)
    assert contents(cache) == contents(material.cache)


def test_a_pair_that_was_mended_is_read_when_its_file_is_removed(material, tmp_path):
    shutil.copytree(material.pairs, tmp_path / "pairs")
    shutil.copytree(material.cache, tmp_path / "cache")
    picture(17).save(tmp_path / "pairs" / "media" / "8_rejected.png")
    (tmp_path / "cache" / "latents" / "00002.safetensors").unlink()
    encoded = Encoded(material.model, tmp_path / "pairs", tmp_path / "cache", SIZE)
    encoded.encode(*FLAGS)
    assert 8 not in [row["row"] for row in listed(tmp_path / "cache")] and len(CachedPairs(tmp_path / "cache")) == 36
    anew = contents(encoded.encode(*FLAGS, cache=tmp_path / "anew"))
    mended = contents(tmp_path / "cache")
    assert mended.keys() == anew.keys()  # reasons name paths, which are others
    assert all(mended[name] == content for name, content in anew.items() if not name.endswith(".jsonl"))


def test_a_mended_pair_of_a_shape_that_was_not_planned_stays_out(material, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 6, {5: "missing"}, size=(32, 64))
    encoded = Encoded(material.model, pairs, tmp_path / "cache", SIZE)
    encoded.encode(*FLAGS, "--buckets")
    picture(11).resize((32, 64)).save(pairs / "media" / "5_rejected.png")
    for file in (tmp_path / "cache" / "latents").glob("*.bad_rows.jsonl"):
        file.with_name(file.name.replace(".bad_rows.jsonl", ".safetensors")).unlink()
    with pytest.raises(DatasetError, match="row 5, the chosen arm: it has the shape .*cache was begun.*new folder"):
        encoded.encode(*SMALL_FILES, "--buckets")
    cache = CachedPairs(encoded.encode(*FLAGS, "--buckets"))
    assert len(cache) == 5 and len({tuple(cache[i]["chosen_latents"].shape) for i in range(5)}) == 1
    assert len(CachedPairs(encoded.encode(*FLAGS, "--buckets", cache=tmp_path / "anew"))) == 6


def test_rows_are_numbered_as_in_the_whole_split(material, tmp_path):
    first = tmp_path / "first.jsonl"
    first.write_text('{"row": 0}\n{"row": 3}\n')
    cache = material.encode(*FLAGS, "--skip_rows", first, cache=tmp_path / "cache")
    assert [row["row"] for row in listed(cache)] == list(BROKEN)[1:]
    both = tmp_path / "both.jsonl"
    both.write_text(first.read_text() + (cache / "bad_rows.jsonl").read_text())
    assert len(CachedPairs(material.encode("--skip_rows", both, cache=tmp_path / "again"))) == len(CachedPairs(cache))


def test_shapes_of_broken_images_end_nothing(material, tmp_path):
    encoded = Encoded(material.model, material.pairs, tmp_path / "cache", SIZE)
    with pytest.raises(DatasetError, match=r"row 8, the rejected arm: not an image .*row\. Mend .*--skip_broken"):
        rows = write_pairs(tmp_path / "pairs", 12, {8: b"no image"})
        Encoded(material.model, rows, tmp_path / "other", SIZE).encode("--buckets")
    assert len(CachedPairs(encoded.encode(*FLAGS, "--buckets"))) == NUM_PAIRS - 7


def test_too_many_broken_pairs_end_the_run_and_nothing_doubtful_is_kept(material, tmp_path, monkeypatch):
    pairs = write_pairs(tmp_path / "pairs", 130, {})
    encoded = Encoded(material.model, pairs, tmp_path / "cache", SIZE)
    shutil.copytree(pairs / "media", tmp_path / "elsewhere")
    for file in (pairs / "media").iterdir():
        if int(file.name.split("_")[0]) >= 85:
            file.unlink()  # the folder is gone
    with pytest.raises(
        DatasetError, match=r"of \d+ pairs are broken .*`--max_broken 0.1`.*Is the folder of the media"
    ):
        encoded.encode(*SMALL_FILES, "--skip_broken")
    kept = contents(tmp_path / "cache")
    assert "latents/00020.safetensors" in kept and "latents/00022.safetensors" not in kept
    assert not [name for name in kept if "bad_rows" in name]
    shutil.rmtree(pairs / "media")
    shutil.copytree(tmp_path / "elsewhere", pairs / "media")
    encoded.encode(*SMALL_FILES, "--skip_broken")
    assert len(CachedPairs(tmp_path / "cache")) == 130
    for number in range(85, 130):
        (pairs / "media" / f"{number}_chosen.png").unlink()
    assert len(CachedPairs(encoded.encode(*FLAGS[:-1], "1", cache=tmp_path / "broken"))) == 85


def test_nothing_but_broken_pairs_is_an_error(material, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 3, dict.fromkeys(range(3), "missing"))
    encoded = Encoded(material.model, pairs, tmp_path / "cache", SIZE)
    with pytest.raises(DatasetError, match="None of the 3 pairs can be read: row 0, the rejected image: there is no"):
        encoded.encode("--skip_broken")
    with pytest.raises(DatasetError, match="is not complete"):
        CachedPairs(tmp_path / "cache")
    for number in range(3):
        picture(number).save(pairs / "media" / f"{number}_rejected.png")
    assert len(CachedPairs(encoded.encode("--skip_broken"))) == 3, "what was missing is looked for again"


def fail_to_open(monkeypatch, times, code):
    """Let opening some image fail so many times, as a file system does that does not answer."""
    monkeypatch.setattr(attempts, "SECONDS_BETWEEN_ATTEMPTS", (0, 0, 0))
    left, opened = [times], PIL.Image.open

    def flaky(source, *arguments, **options):
        if "20_chosen" in str(source) and left[0]:
            left[0] -= 1
            raise OSError(code, "does not answer", str(source))
        return opened(source, *arguments, **options)

    monkeypatch.setattr(PIL.Image, "open", flaky)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_system_that_answers_again_is_not_the_fault_of_a_row(code, material, tmp_path, monkeypatch):
    fail_to_open(monkeypatch, 3, code)
    assert contents(material.encode(*FLAGS, cache=tmp_path / "cache")) == contents(material.cache)


def test_a_file_that_may_not_be_read_ends_the_run(material, tmp_path, monkeypatch):
    fail_to_open(monkeypatch, -1, errno.EACCES)
    with pytest.raises(MediaAccessError, match="row 20, the chosen image: the file .*20_chosen.png' cannot be read"):
        material.encode(*FLAGS, cache=tmp_path / "cache")
    monkeypatch.undo()
    assert contents(material.encode(*FLAGS, cache=tmp_path / "cache")) == contents(material.cache)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": 0.5}, "of 1 rows 1 are ties and 0 have no label"),
        ({"text": "p", "image_a": "a", "image_b": "b"}, "no preference data that is known here"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": 3}, "row 0, column 'label'"),
    ],
)
def test_data_that_cannot_be_encoded_is_refused_before_a_model_is_loaded(rows, message, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(rows) + "\n")
    with pytest.raises(DatasetError, match=message):
        Encoded(tmp_path / "no model", tmp_path, tmp_path / "cache", SIZE).encode()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_broken", "0.2"], "`--max_broken` is a limit to what `--skip_broken` leaves out"),
        (["--skip_broken", "--max_broken", "5"], r"`--max_broken` is a share of the pairs, in \[0, 1\]; got 5"),
        (["--shard_mb", "inf"], "`--shard_mb` must be a positive number, got inf"),
        (["--frame_rate", "8"], "`--frame_rate` is of videos: give `--num_frames` more than one frame"),
    ],
)
def test_options_that_make_no_sense(options, message, material, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        material.encode(*options, cache=tmp_path / "cache")


def test_left_out_pairs_tell_caches_apart(material, tmp_path):
    pairs = CachedPairs(material.cache)
    shutil.copytree(material.cache, tmp_path / "cache")
    other = CachedPairs(tmp_path / "cache")
    assert other.fingerprint == pairs.fingerprint
    other._broken = np.array([1, 2, 3, 4, 5, 6, 7])
    assert other.fingerprint != pairs.fingerprint


@pytest.mark.parametrize("limit", [1500, 5000, 20_000])
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on(limit, material, tmp_path):
    """Files that may not grow further stand for a disk without room for the plan, for the texts, for the latents."""
    cache, before = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    options = ("--dtype", "float32", "--skip_broken", "--max_broken", "0.5", "--shard_prompts", "8")
    whole = contents(material.encode(*options, cache=tmp_path / "whole"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written: .*File too large.*run the same command again"):
            material.encode(*options, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = contents(cache)
    assert all(content == whole[name] for name, content in left.items() if name.endswith(".safetensors"))
    assert not [name for name in left if name.endswith(".tmp")]
    assert contents(material.encode(*options, cache=cache)) == whole
