# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, on models so small that only the script is tested."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("extra", [["--checkpointing"], ["--full", "--dtype", "float32"]], ids=["lora", "full"])
def test_sd15_step(extra, tmp_path, capsys):
    path = tmp_path / "result.json"
    argv = ["--tiny", "--device", "cpu", "--latent-size", "8", "--steps", "2", "--output", str(path), *extra]
    _load("sd15_step").main(argv)
    result = json.loads(path.read_text())
    assert [run["method"] for run in result["runs"]] == ["dpo", "sipo"]
    for run in result["runs"]:
        assert run["forward_passes_per_step"] == 2  # the reference's and the policy's; none for the weight
        assert run["seconds"] > 0 and run["cpu_seconds"] > 0 and run["peak_memory_gib"] > 0.05
        assert len(run["all_seconds"]) == 2 and 0 <= run["masked_fraction"] <= 1
    trained = [run["trained_parameters"] for run in result["runs"]]
    whole = result["unet_parameters"]
    assert trained == [whole, whole] if "--full" in extra else max(trained) < whole
    printed = capsys.readouterr().out
    assert "| sipo |" in printed and "to dpo (wall)" in printed
    assert result["settings"]["latent_size"] == 8 and result["environment"]["torch"]


@pytest.mark.gpu
def test_sd15_step_on_a_gpu(tmp_path):
    argv = ["--tiny", "--device", "cuda", "--latent-size", "8", "--steps", "2", "--method", "sipo"]
    result = _load("sd15_step").main([*argv, "--output", str(tmp_path / "result.json")])
    (run,) = result["runs"]
    assert result["environment"]["gpu"] and 0 < run["peak_memory_gib"] < 1 and run["forward_passes_per_step"] == 2


def test_one_step_is_too_few(tmp_path, capsys):
    with pytest.raises(SystemExit):
        _load("sd15_step").main(["--steps", "1", "--output", str(tmp_path / "result.json")])
    assert "--steps" in capsys.readouterr().err


def test_the_unet_has_the_published_size():
    """859,520,964 parameters, counted without memory for them."""
    benchmark = _load("sd15_step")
    options = benchmark.make_parser().parse_args([])
    with torch.device("meta"):
        unet = benchmark.make_unet(options)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
