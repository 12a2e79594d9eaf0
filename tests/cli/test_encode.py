# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo encode`: the same bytes however often it was killed and by however many processes."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.cached import Encoded
from tests.trainer.runs import picture
from trl_sipo.adapters import adapter_for
from trl_sipo.cli.main import main
from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.data.transforms import image_to_tensor
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError

ROOT = Path(__file__).resolve().parents[2]
# Four pairs to a file of latents, and eight prompts to one of embeddings.
SMALL_FILES = ("--dtype", "float32", "--shard_mb", "0.0079", "--shard_prompts", "8")
SIZE = {"height": 32, "width": 32, "num_frames": 1}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Encoded:
    """A model and 42 pairs with 21 prompts, and the cache of an undisturbed run."""
    folder = tmp_path_factory.mktemp("encode")
    tiny_stable_diffusion().save_pretrained(folder / "model")
    arms = {arm: [picture(2 * i + k) for i in range(42)] for k, arm in enumerate(("chosen", "rejected"))}
    prompts = [f"prompt number {i % 21}" if i % 21 else "ein Gürteltier 🦔" for i in range(42)]
    datasets.Dataset.from_dict({"prompt": prompts, **arms}).to_parquet(folder / "pairs.parquet")
    encoded = Encoded(folder / "model", folder / "pairs.parquet", folder / "cache", SIZE)
    encoded.encode(*SMALL_FILES)
    return encoded


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    files = (Path(path, name) for path, _, names in os.walk(folder) for name in names)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def start(*arguments: object) -> str:
    """Run `encode_processes.py`; returns what it printed, errors too."""
    script = str(Path(__file__).with_name("encode_processes.py"))
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def test_a_cache_holds_the_pairs_in_their_order(material):
    pairs = CachedPairs(material.cache)
    rows = load_preference_dataset(material.pairs)
    assert len(pairs) == 42 and pairs.index.num_shards == 11 and pairs.index.num_prompts == 21
    adapter = adapter_for(tiny_stable_diffusion())
    for index in (0, 3, 4, 41):
        item = pairs[index]
        assert (item["pair_index"], item["prompt"]) == (index, rows[index]["prompt"])
        for arm in ("chosen", "rejected"):
            expected = adapter.encode_media(image_to_tensor(rows[index][arm])[None])[0]
            torch.testing.assert_close(item[f"{arm}_latents"], expected, rtol=0, atol=1e-5)
        expected = adapter.encode_prompts([item["prompt"]])[0]
        torch.testing.assert_close(item["conditioning"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pairs.null_conditioning(), adapter.null_conditioning(), rtol=0, atol=1e-6)
    assert pairs[-1]["pair_index"] == 41
    with pytest.raises(IndexError):
        pairs[42]


def test_a_second_run_writes_nothing(material, tmp_path, capsys):
    cache = tmp_path / "cache"
    shutil.copytree(material.cache, cache)
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    material.encode(*SMALL_FILES, cache=cache)
    assert before == {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}


@pytest.mark.parametrize("lost", ["latents/00003.safetensors", "text/00001.safetensors", "text/null.safetensors"])
def test_what_is_missing_is_refused_and_then_written(lost, material, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(material.cache, cache)
    (cache / lost).unlink()
    (cache / lost).with_name(f".{Path(lost).name}.123.tmp").write_bytes(b"torn")
    with pytest.raises(DatasetError, match=f"not complete: 1 of 15 files are missing, such as {lost}"):
        CachedPairs(cache)
    material.encode(*SMALL_FILES, cache=cache)
    assert contents(cache) == contents(material.cache)


def test_a_killed_run_ends_in_the_same_bytes(material, tmp_path):
    printed = start("kill", 8, 0, *material.argv(tmp_path / "cache", *SMALL_FILES))
    assert int(re.search(r"partial (\d+)", printed)[1]) > 0, "no kill came while files were written"
    assert contents(tmp_path / "cache") == contents(material.cache)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_is_killed_many_times_ends_in_the_same_bytes(seed, material, tmp_path):
    start("kill", 25, seed, *material.argv(tmp_path / "cache", *SMALL_FILES))
    assert contents(tmp_path / "cache") == contents(material.cache)


def test_processes_that_share_the_work_write_the_same_bytes(material, tmp_path):
    start("share", 3, *material.argv(tmp_path / "cache", *SMALL_FILES))
    assert contents(tmp_path / "cache") == contents(material.cache)


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes(material, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = material.argv(tmp_path / "cache", *SMALL_FILES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, "-m", "trl_sipo.scripts.encode", *argv], env=environment, check=True, timeout=500)
    assert contents(tmp_path / "cache") == contents(material.cache)


def test_workers_change_nothing(material, tmp_path):
    material.encode(*SMALL_FILES, "--num_workers", 2, cache=tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(material.cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resolution", "16"), r"`size`: it has \(32, 32\), now it is \(16, 16\)"),
        (("--dtype", "bfloat16"), "`dtype`: it has 'float32', now it is 'bfloat16'"),
        (("--posterior_std",), "`posterior_std`: it has False, now it is True"),
        (("--limit", "10"), "`num_pairs`: it has 42, now it is 10"),
        (("--buckets",), "`buckets`: it has None, now it is"),
    ],
)
def test_other_settings_are_refused_with_both_values_and_the_way_out(options, message, material):
    with pytest.raises(ConfigurationError, match=f"{message}.*another folder for a second cache"):
        material.encode(*SMALL_FILES, *options)


def test_another_model_or_other_data_are_refused(material, tmp_path):
    tiny_stable_diffusion(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="the model: it has 'StableDiffusionPipeline .*/model, encoders"):
        Encoded(tmp_path / "other", material.pairs, material.cache, SIZE).encode(*SMALL_FILES)
    # The same model elsewhere is the same model.
    shutil.copytree(material.model, tmp_path / "model")
    Encoded(tmp_path / "model", material.pairs, material.cache, SIZE).encode(*SMALL_FILES)
    rows = load_preference_dataset(material.pairs).to_list()
    rows[7]["prompt"] = "another prompt"
    features = load_preference_dataset(material.pairs).features
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ConfigurationError, match="the data"):
        Encoded(material.model, tmp_path / "pairs.parquet", material.cache, SIZE).encode(*SMALL_FILES)


def test_a_folder_of_something_else_is_left_alone(material, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigurationError, match="no cache and not empty: it holds 'thesis.tex'"):
        material.encode(cache=tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def test_limit_bfloat16_and_splits(material, tmp_path, capsys):
    argv = material.argv(tmp_path / "cache" / "train", "--limit", "5")
    assert main(["encode", *argv]) == 0
    assert "Encoding 5 pairs" in capsys.readouterr().out
    pairs = load_preference_dataset(tmp_path / "cache")
    assert len(pairs) == 5 and pairs.dtype == torch.bfloat16
    exact = CachedPairs(material.cache)
    assert pairs[4]["prompt"] == exact[4]["prompt"] and pairs[4]["chosen_latents"].dtype == torch.float32
    torch.testing.assert_close(pairs[4]["chosen_latents"], exact[4]["chosen_latents"], rtol=2**-8, atol=1e-6)
    with pytest.raises(DatasetError, match="cache of the split 'train', not 'test'"):
        load_preference_dataset(tmp_path / "cache" / "train", split="test")
    with pytest.raises(DatasetError, match="streaming=True does not apply to a cache"):
        load_preference_dataset(material.cache, streaming=True)


def test_a_training_command_takes_the_folder_of_the_splits(material, tmp_path, capsys):
    for split in ("train", "test"):
        argv = [*material.argv(tmp_path / "cache" / split, "--limit", "4"), "--dataset_split", split]
        assert main(["encode", *argv]) == 0
    argv = ["dpo", "--model_name_or_path", material.model, "--dataset_name", tmp_path / "cache", "--use_peft"]
    options = (
        "--resolution 32 --eval_strategy steps --eval_steps 1 --max_steps 1 --use_cpu --bf16 false --report_to none"
    )
    assert main([*map(str, argv), *options.split(), "--output_dir", str(tmp_path / "run")]) == 0
    assert "eval_loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    audit = ["audit", "weights", *map(str, argv[1:5]), "--resolution", "32", "--num_pairs", "2", "--num_levels", "3"]
    assert main(audit) == 0
    assert main(["data", "check", str(tmp_path / "cache")]) == 2
    assert "a CachedPairs was checked when it was made" in capsys.readouterr().err


def test_soft_labels_come_along(material, tmp_path):
    rows = load_preference_dataset(material.pairs).select(range(4)).add_column("label", [0.5, 1.0, 0.2, 0.75])
    rows.to_parquet(tmp_path / "pairs.parquet")
    encoded = Encoded(material.model, tmp_path / "pairs.parquet", tmp_path / "cache", SIZE)
    pairs = CachedPairs(encoded.encode("--soft_labels"))
    assert [pairs[i]["label"] for i in range(4)] == pytest.approx([0.5, 1.0, 0.8, 0.75])
    hard = CachedPairs(encoded.encode(cache=tmp_path / "hard"))
    assert len(hard) == 3 and "label" not in hard[0], "the tie is no pair"
    torch.testing.assert_close(hard[1]["chosen_latents"], pairs[2]["chosen_latents"], rtol=0, atol=0)


def test_the_noise_of_stored_soft_labels_is_told(material, tmp_path, capsys):
    """And of a cache whose labels only say which arm is preferred, none can be."""
    rows = load_preference_dataset(material.pairs).select(range(3)).add_column("label", [1.0, 0.2, 0.75])
    rows.to_parquet(tmp_path / "pairs.parquet")
    encoded = Encoded(material.model, tmp_path / "pairs.parquet", tmp_path / "cache", SIZE)
    encoded.encode("--soft_labels")
    encoded.encode(cache=tmp_path / "hard")
    for cache, words in (
        ("cache", "Estimated from the labels of 3 pairs: 15.0% ["),
        ("hard", "Assumed: labels without"),
    ):
        data = ["--dataset_name", str(tmp_path / cache), "--num_pairs", "3", "--num_levels", "2"]
        argv = ["audit", "beta", "--model_name_or_path", str(material.model), *data, "--win_rate", "0.55"]
        assert main(argv) == 0
        assert words in capsys.readouterr().out


def test_export_to_webdataset(material, tmp_path):
    argv = ["encode", "--export", "webdataset", "--cache", str(material.cache), "--output", str(tmp_path / "tar")]
    assert main(argv) == 0
    pairs = CachedPairs(material.cache)
    with tarfile.open(tmp_path / "tar" / "00000.tar") as tar:
        names = tar.getnames()
        assert len(names) == 3 * 42 and names == sorted(names)
        read = {name: tar.extractfile(name).read() for name in names if name.startswith("000000007")}
    assert json.loads(read["000000007.json"]) == {"prompt": "prompt number 7", "pair_index": 7}
    latents = safetensors.torch.load(read["000000007.latents.safetensors"])
    torch.testing.assert_close(latents["rejected"], pairs[7]["rejected_latents"], rtol=0, atol=0)
    text = safetensors.torch.load(read["000000007.text.safetensors"])
    torch.testing.assert_close(text, pairs[7]["conditioning"], rtol=0, atol=0)
    assert main(argv) == 2, "what is there is not written over"


def test_a_denoiser_is_not_loaded_to_encode(material, tmp_path):
    shutil.copytree(material.model, tmp_path / "model", ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    shutil.copytree(material.model / "vae", tmp_path / "model" / "vae", dirs_exist_ok=True)
    encoded = Encoded(tmp_path / "model", material.pairs, tmp_path / "cache", SIZE)
    assert contents(encoded.encode(*SMALL_FILES))["latents/00000.safetensors"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset_name", "x"], "`--model_name_or_path` is required"),
        (["--export", "webdataset"], "`--export` needs `--cache`"),
        (["--model_name_or_path", "m", "--dataset_name", "x", "--limit", "0"], "`--limit` must be at least 1"),
        (["--model_name_or_path", "m", "--dataset_name", "x", "--resolution", "1", "2", "3"], "a height and a width"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv, message, tmp_path, capsys):
    assert main(["encode", "--output", str(tmp_path / "cache"), *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "name", "advice"),
    [("vae", "quant_conv.bias", "--vae_dtype"), ("text_encoder", "final_layer_norm.bias", "--text_dtype")],
)
def test_numbers_that_are_not_finite_are_never_stored(part, name, advice, material, tmp_path):
    pipeline = tiny_stable_diffusion()
    broken = next(value for key, value in getattr(pipeline, part).named_parameters() if key.endswith(name))
    broken.data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(NumericalError, match=f"not finite.*{advice}"):
        Encoded(tmp_path / "model", material.pairs, tmp_path / "cache", SIZE).encode()
    with pytest.raises(DatasetError, match="not complete"):
        CachedPairs(tmp_path / "cache")


def test_latents_and_caches_are_not_encoded_again(material, tmp_path):
    with pytest.raises(DatasetError, match="is a cache already"):
        Encoded(material.model, material.cache, tmp_path / "second", SIZE).encode()
