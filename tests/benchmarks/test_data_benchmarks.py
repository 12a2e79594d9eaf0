# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of reading and encoding run on a few pairs, and say what they saw."""

import io
import json
import sys

import pytest
import torch
from PIL import Image


def test_encoding_is_held_against_the_bare_loop(script, tmp_path, capsys):
    path = tmp_path / "out.json"
    sizes = ["--resolution", "64", "--source-side", "96", "--pairs", "4", "--pairs-per-prompt", "2", "--rounds", "1"]
    script("encode_speed").main(["--model", "tiny", "--device", "cpu", *sizes, "--output", str(path)])
    result = json.loads(path.read_text())
    cases = ("each prompt once", "shared prompts")
    encoded = {f"{kind}, {case}" for kind in ("encode", "encode again", "bare") for case in cases}
    assert result["seconds"].keys() == encoded | {"bare, a prompt a pair"}
    for case in cases:
        speed = result["pairs_per_second"]
        expected = speed[f"encode, {case}"] / speed[f"bare, {case}"]
        assert result["ratios"][f"encode / bare, {case}"]["ratio"] == pytest.approx(expected)
    assert "target >= 0.95" in capsys.readouterr().out


def test_what_the_command_does_once_is_taken_off(script):
    """Four pairs in 3 - 1 seconds."""
    seconds = {"encode, x": [3.0], "encode again, x": [1.0], "bare, x": [1.0]}
    assert script("encode_speed").pairs_per_second(seconds, 4) == {"encode, x": 2.0, "bare, x": 4.0}


def test_the_bare_loop_encodes_what_the_command_does(script, tmp_path):
    """Each prompt once or for each pair, and both arms of each pair."""
    encode_speed, pipelines = script("encode_speed"), script("random_pipelines")
    options = encode_speed.make_parser().parse_args(["--resolution", "64", "--workers", "0"])
    data = script("synthetic_pairs").write_parquet(tmp_path / "data", 4, 64, pairs_per_prompt=2)
    pipeline = pipelines.make_pipeline(pipelines.PIPELINES["tiny"])
    counts = {"prompts": 0, "pictures": 0}

    def count(name, inputs):
        counts[name] += len(inputs)

    pipeline.text_encoder.register_forward_pre_hook(lambda _, inputs: count("prompts", inputs[0]))
    pipeline.vae.encoder.register_forward_pre_hook(lambda _, inputs: count("pictures", inputs[0]))
    for once, prompts in ((True, 2), (False, 4)):
        counts.update(prompts=0, pictures=0)
        encode_speed.BareLoop(pipeline, data, options, each_prompt_once=once)()
        assert counts == {"prompts": prompts, "pictures": 8}


def test_all_readers_give_all_pairs(script, tmp_path, capsys):
    path = tmp_path / "out.json"
    sizes = ["--resolution", "64", "--source-side", "96", "--pairs", "4", "--batch-size", "2", "--rounds", "1"]
    script("loader").main(["--model", "tiny", "--device", "cpu", *sizes, "--workers", "1", "--output", str(path)])
    result = json.loads(path.read_text())
    readers = {"bare: decode, resize", "Parquet", "image folder", "stream of Parquet", "cache"}
    assert result["readers"].keys() == {"0", "1"} and result["share_of_step"].keys() == readers
    for by_reader in result["readers"].values():
        assert by_reader.keys() == readers
        assert all(found["pairs_per_second"] > 0 for found in by_reader.values())
    assert "share of a step" in capsys.readouterr().out


def test_the_share_of_a_step_by_hand(script):
    """Processor time on a CPU, as the step is measured; else the time that passes."""
    result = {"pairs_per_second": 10.0, "processor_seconds_per_pair": 0.05}
    assert script("loader").share_of_step(result, 0.5, "cpu") == pytest.approx(0.1)
    assert script("loader").share_of_step(result, 0.5, "cuda") == pytest.approx(0.2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_memory_of_a_process_of_its_own(script, tmp_path, capsys):
    path = tmp_path / "out.json"
    script("resident_memory").main(
        ["--pairs", "2", "4", "--readers", "Parquet", "--folder", str(tmp_path), "--output", str(path)]
    )
    result = json.loads(path.read_text())
    by_pairs = result["bytes"]["Parquet"]
    assert [found["pairs"] for found in by_pairs.values()] == [2, 4]
    assert all(10 * 2**20 < found["own"] < found["resident"] <= found["peak"] for found in by_pairs.values())
    assert result["ratios"].keys() == {"Parquet, own", "Parquet, resident"}
    assert "target <= 1.05" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_own_memory_is_that_which_is_held(script):
    memory = script("resident_memory").memory
    before = memory()["own"]
    held = torch.ones(2**24)  # 64 MiB
    grown = memory()["own"] - before
    assert 0.9 * held.nbytes < grown < 1.5 * held.nbytes


def test_encoding_and_reading_the_cache_as_their_processes_do(script, tmp_path, capsys):
    resident, pipelines = script("resident_memory"), script("random_pipelines")
    pipelines.make_pipeline(pipelines.PIPELINES["tiny"]).save_pretrained(tmp_path / "model")
    script("synthetic_pairs").write_parquet(tmp_path / "data", 3, 32, pairs_per_prompt=2)
    assert [read(tmp_path, 32) for read in resident.READERS.values()] == [3, 3, 3, 3]


def test_growth_is_from_the_second_largest_number(script):
    found = {1: {"own": 1, "resident": 1}, 10: {"own": 100, "resident": 200}, 100: {"own": 104, "resident": 240}}
    ratios = script("resident_memory").growth({"x": found})
    assert {name: (entry.ratio, entry.verdict.split()[-1]) for name, entry in ratios.items()} == {
        "x, own": (1.04, "met"),
        "x, resident": (1.2, "MISSED"),
    }
    assert script("resident_memory").growth({"x": {1: {"own": 1, "resident": 1}}}) == {}


def test_the_cache_needs_the_command_before_it(script, capsys):
    with pytest.raises(SystemExit):
        script("resident_memory").main(["--readers", "cache"])
    assert "trl-sipo encode" in capsys.readouterr().err


def test_pairs_are_the_same_each_time_and_in_each_form(script, tmp_path):
    pairs = script("synthetic_pairs")
    first, second = (list(pairs.rows(3, 32, pairs_per_prompt=2)) for _ in range(2))
    assert first == second and len({row["chosen"] for row in first} | {row["rejected"] for row in first}) == 6
    assert [row["prompt"] for row in first] == ["a red", "a red", "a old"]
    assert Image.open(io.BytesIO(first[0]["chosen"])).size == (32, 32)
    folder = pairs.write_image_folder(tmp_path / "images", 3, 32)
    assert (folder / "chosen" / "2.jpg").read_bytes() == first[2]["chosen"]
    parquet = pairs.write_parquet(tmp_path / "parquet", 3, 32, pairs_per_prompt=2, files=2)
    rows = script("encode_speed").load_preference_dataset(str(parquet)).with_format("arrow")[:]
    assert [cell["bytes"] for cell in rows["rejected"].to_pylist()] == [row["rejected"] for row in first]


@pytest.mark.parametrize(
    ("ratio", "target", "below", "verdict"),
    [
        (1.0, None, True, ""),
        (1.03, 1.03, True, "target <= 1.03: met"),
        (1.04, 1.03, True, "target <= 1.03: MISSED"),
        (0.96, 0.95, False, "target >= 0.95: met"),
        (0.94, 0.95, False, "target >= 0.95: MISSED"),
    ],
)
def test_verdicts(ratio, target, below, verdict, script):
    assert script("records").Ratio(ratio, target, below).verdict == verdict
