# SPDX-License-Identifier: Apache-2.0
"""The example script on a tiny pipeline, in a process of its own, and every configuration through the real parser."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import predict, preference_pairs
from trl_sipo.cli.main import main
from trl_sipo.core.beta import to_diffusion_dpo_beta
from trl_sipo.scripts.train import lora_config, parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "sd15_lora.py"
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TINY_RUN = (
    "--steps", "2", "--batch-size", "2", "--accumulation", "2", "--learning-rate", "1e-2", "--inference-steps", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny pipeline and preference pairs as Parquet, on disk."""
    folder = tmp_path_factory.mktemp("material")
    tiny_stable_diffusion().save_pretrained(folder / "base")
    preference_pairs(4).to_parquet(folder / "train.parquet")
    return folder


def _options(material, output, method):
    given = ("--model", material / "base", "--dataset", material / "train.parquet", "--output", output)
    return [str(part) for part in (*given, "--method", method, *TINY_RUN)]


def test_the_script_trains_saves_and_compares_in_a_process_of_its_own(material, tmp_path):
    command = [sys.executable, str(SCRIPT), *_options(material, tmp_path / "out", "sipo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "SIPO on StableDiffusion" in done.stdout and "comparison.png" in done.stdout

    comparison = Image.open(tmp_path / "out" / "comparison.png")
    assert comparison.size == (64, 32)
    base, tuned = comparison.crop((0, 0, 32, 32)), comparison.crop((32, 0, 64, 32))
    assert ImageChops.difference(base, tuned).getbbox() is not None
    untrained, trained = (DiffusionPipeline.from_pretrained(material / "base") for _ in range(2))
    trained.load_lora_weights(tmp_path / "out")
    assert not torch.allclose(predict(untrained), predict(trained), atol=1e-4)
    assert "SIPO" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "title", "beta"),
    [("dpo", "Diffusion-DPO", 5000), ("dpo_cm", "DPO-C&M", 1000), ("poly-dpo", "Poly-DPO", 7)],
)
def test_the_other_methods(method, title, beta, material, tmp_path, capsys):
    script = runpy.run_path(str(SCRIPT))
    argv = _options(material, tmp_path, method)
    script["train"](script["make_parser"]().parse_args([*argv, "--beta", "7"] if beta == 7 else argv))
    printed = capsys.readouterr().out
    assert f"{title} on StableDiffusionPipeline" in printed and f"beta = {beta} " in printed
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_the_script_is_short():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 120


def _command_in(config: Path) -> list[str]:
    """The first command that the file's comment gives."""
    (line, *_) = (line for line in config.read_text(encoding="utf-8").splitlines() if "trl-sipo " in line)
    return line.removeprefix("#").split()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_a_configuration_is_right(config, monkeypatch):
    """The file parses without unknown keys by the command that it names itself."""
    monkeypatch.chdir(ROOT)
    program, method, *argv = _command_in(config)
    assert program == "trl-sipo" and str(config.relative_to(ROOT)) in argv
    data, training, model = parse(method, argv)
    assert data.dataset_name == "your/preferences" and model.model_name_or_path.endswith("stable-diffusion-v1-5")
    if method == "sipo":
        assert training.objective == ("dpo_cm" if "dpo_cm" in config.stem else "sipo")
    assert training.output_dir.startswith(config.stem.replace("_", "-").removesuffix("-single-gpu"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_no_configuration_names_data_that_may_be_gone(config, capsys):
    method = _command_in(config)[1]
    assert main([method, "--config", str(config)]) == 2
    assert "`dataset_name` is required" in capsys.readouterr().err


# method, beta in the paper's Table A1 (the last is ViPO's, and not in the paper's convention)
PUBLISHED = {
    "sd15_dpo": ("dpo", 5.0),
    "sd15_sipo": ("sipo", 1.0),
    "sd15_dpo_cm": ("sipo", 1.0),
    "sd15_poly_dpo": ("poly-dpo", 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    """SIPO paper, Table A1: Adam, 2e-5, 16 GPUs x batch 1 x accumulation 64, fp16; clip 0.1; grid of Fig. 4."""
    method, paper_beta = PUBLISHED[name]
    config = ROOT / "examples" / "configs" / f"{name}.yaml"
    _, training, model = parse(method, ["--config", str(config), "--dataset_name", "x/y"])
    assert training.beta == to_diffusion_dpo_beta(paper_beta, "sipo_paper")
    assert training.beta_convention == "diffusion_dpo" and training.learning_rate == 2e-5
    assert 16 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 1024
    assert training.fp16 and not training.bf16 and training.weight_decay == 0 and training.max_steps == 2000
    assert training.lr_scheduler_type == "constant" and lora_config(model) is None
    if method == "sipo":
        assert (training.clip_range, training.mask_threshold, training.importance_steps) == (0.1, None, 50)
        assert training.mask and training.reweight and training.weight_grad
    if method == "poly-dpo":
        assert training.poly_alpha == 8.0


def test_one_gpu_trains_a_lora_with_the_published_objective():
    config = ROOT / "examples" / "configs" / "sd15_sipo_single_gpu.yaml"
    _, training, model = parse("sipo", ["--config", str(config), "--dataset_name", "x/y"])
    assert lora_config(model).r == 8 and not training.fp16
    assert (training.objective, training.beta) == ("sipo", 1000.0)
    assert (training.clip_range, training.importance_steps) == (0.1, 50)
    assert training.sample_every_steps and len(training.sample_prompts) == 4
