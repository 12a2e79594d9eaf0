# SPDX-License-Identifier: Apache-2.0
"""The example scripts on tiny pipelines, one in a process of its own, and every configuration through the parser."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from tests.adapters.backbone_cases import BACKBONES
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.media import pairs_for
from tests.trainer.runs import predict, preference_pairs
from trl_sipo.adapters import ADAPTERS
from trl_sipo.cli.main import main
from trl_sipo.core.beta import to_diffusion_dpo_beta
from trl_sipo.scripts.train import lora_config, parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "sd15_lora.py"
# Of diffusion models; `text_*` is for `tests/cli/test_sipo_text.py`, `online_*` for `tests/cli/test_online.py`. What
# is for the model in the package, `demo_*`, has a test of its own below.
OTHERS = ("text_", "online_", "demo_")
CONFIGS = sorted(path for path in (ROOT / "examples" / "configs").glob("*.yaml") if not path.stem.startswith(OTHERS))
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


# Script of a backbone: the tiny pipeline that it is run on.
BACKBONE_SCRIPTS = {
    "cogvideox": "cogvideox_2b",
    "flux": "flux",
    "flux2": "flux2_klein",
    "hunyuan_video": "hunyuanvideo",
    "hunyuan_video15": "hunyuanvideo15",
    "ltx": "ltx",
    "qwen_image": "qwenimage",
    "sd3": "sd35",
    "sdxl": "sdxl",
    "wan": "wan21",
    "wan22": "wan22_5b",
    "z_image": "zimage",
}
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", BACKBONE_SCRIPTS)
def test_a_backbones_script_trains_a_lora_that_plain_diffusers_loads(name, tmp_path, monkeypatch):
    case = next(case for case in BACKBONES if case.name.split("-")[0] == BACKBONE_SCRIPTS[name])
    base = case.build()
    base.save_pretrained(tmp_path / "base")
    pairs_for(case, tmp_path).to_parquet(tmp_path / "train.parquet")
    size = case.size
    options = {
        "--model_name_or_path": tmp_path / "base",
        "--dataset_name": tmp_path / "train.parquet",
        "--output_dir": tmp_path / "out",
        "--max_steps": 2,
        "--per_device_train_batch_size": 4,
        "--gradient_accumulation_steps": 2,
        "--learning_rate": 1e-2,
        "--use_cpu": "true",
    }
    if size["num_frames"] > 1:
        options |= {"--num_frames": size["num_frames"], "--frame_rate": 12}
    argv = [str(part) for option in options.items() for part in option]
    argv += ["--resolution", str(size["height"]), str(size["width"])]
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    runpy.run_path(str(ROOT / "examples" / f"{name}_lora.py"), run_name="__main__")
    before = case.generate(base, output_type="pt")
    case.load_lora(base, tmp_path / "out")
    assert (case.generate(base, output_type="pt") - before).abs().max() > 1e-5
    assert "SIPO" in (tmp_path / "out" / "README.md").read_text()


def test_every_adapter_has_a_script_and_a_configuration():
    assert {path.stem.removesuffix("_lora") for path in SCRIPTS} == {*BACKBONE_SCRIPTS, "sd15"}
    trained = {
        type(case.build()).__name__ for case in BACKBONES if case.name.split("-")[0] in BACKBONE_SCRIPTS.values()
    }
    assert trained | {"StableDiffusionPipeline", "Flux2Pipeline"} == set(ADAPTERS)
    for name in BACKBONE_SCRIPTS:
        family = name.replace("sd3", "sd35").replace("wan22", "wan22_5b").removesuffix("_lora")
        assert any(config.stem.startswith(family) for config in CONFIGS), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_how_to_run_it(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert f"python examples/{script.name} --dataset" in text


@pytest.mark.parametrize("name", BACKBONE_SCRIPTS)
def test_a_scripts_settings_are_those_of_its_configuration(name):
    """What is particular to a model is stated twice, as Python and as YAML, and must not come apart."""
    script = runpy.run_path(str(ROOT / "examples" / f"{name}_lora.py"))
    _, training, model = parse("sipo", ["--dataset_name", "x/y"], script["SETTINGS"])
    same = [config for config in CONFIGS if f"model_name_or_path: {model.model_name_or_path}\n" in config.read_text()]
    config = next(config for config in same if config.stem.endswith("_sipo_single_gpu"))
    _, of_config, model_of_config = parse("sipo", ["--config", str(config), "--dataset_name", "x/y"])
    for setting in (
        "beta", "resolution", "num_frames", "frame_rate", "timestep_sampling", "embedded_guidance_scale",
        "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
    ):  # fmt: skip
        assert getattr(training, setting) == getattr(of_config, setting), setting
    assert (model.lora_r, model.lora_alpha) == (model_of_config.lora_r, model_of_config.lora_alpha)


def test_a_mistake_in_a_scripts_options_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "wan_lora.py"), "--dataset_name", "x/y", "--num_frames", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "sipo: `num_frames` must be at least 1, got 0."


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
    assert data.dataset_name == "your/preferences"
    if method == "sipo":
        assert training.objective == ("dpo_cm" if "dpo_cm" in config.stem else "sipo")
    assert training.output_dir.startswith(config.stem.replace("_", "-").removesuffix("-single-gpu"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_for_its_model(config):
    """Clips for video models alone, at a size and length that they take, and a model id like that of its script."""
    _, training, model = parse(_command_in(config)[1], ["--config", str(config), "--dataset_name", "x/y"])
    families = [name for name in (*BACKBONE_SCRIPTS, "sd15", "sd35") if config.stem.startswith(name)]
    family = max(families, key=len)
    is_video = family.startswith(("cogvideox", "wan", "ltx", "hunyuan"))
    assert (training.num_frames > 1) == (training.frame_rate is not None) == is_video
    stride = 8 if family in ("cogvideox", "ltx") else 4
    assert not is_video or training.num_frames % stride == 1
    assert training.beta == (20 if is_video else 1000) or _command_in(config)[1] not in ("sipo", "poly-dpo")
    organisation = model.model_name_or_path.split("/")[0]
    script = ROOT / "examples" / f"{'sd3' if family == 'sd35' else family}_lora.py"
    assert f'"{organisation}/' in script.read_text(encoding="utf-8")


def _commands_of_the_model_in_the_package():
    """The two in the comment: how pairs are made, and what trains on them."""
    config = ROOT / "examples" / "configs" / "demo_dpo_proximal.yaml"
    comment = config.read_text(encoding="utf-8").replace("\\\n#", "")
    return [line.split()[2:] for line in comment.splitlines() if line.startswith("#   trl-sipo ")]


def test_the_configuration_of_the_model_in_the_package_is_right(monkeypatch):
    monkeypatch.chdir(ROOT)
    (_, *feedback), (method, *train) = _commands_of_the_model_in_the_package()
    data, training, model = parse(method, train)
    assert data.dataset_name == feedback[feedback.index("--output") + 1] + "/pairs.parquet"
    assert f"base={model.model_name_or_path}" in feedback and (ROOT / model.model_name_or_path).is_dir()
    assert (training.beta, training.proximal_kappa, training.learning_rate) == (2.0, 0.5, 5e-5)


@pytest.mark.slow
def test_the_configuration_of_the_model_in_the_package_trains(tmp_path, monkeypatch):
    """By its commands, up to paths and numbers."""
    monkeypatch.chdir(ROOT)
    feedback, train = _commands_of_the_model_in_the_package()
    small = ["--samples_per_prompt", "2", "--num_inference_steps", "1", "--max_prompts", "4", "--min_margin", "0"]
    pairs = tmp_path / "feedback" / "pairs.parquet"
    assert main([*feedback, "--output", str(tmp_path / "feedback"), *small]) == 0
    few = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run")]
    assert main([*train[:-1], str(pairs), *few]) == 0
    assert "kappa = 0.5" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_no_configuration_names_data_that_may_be_gone(config, capsys):
    method = _command_in(config)[1]
    assert main([method, "--config", str(config)]) == 2
    assert "`dataset_name` is required" in capsys.readouterr().err


# SIPO paper, Table A1: Adam, 2e-5, 16 GPUs, fp16; per column the pairs of a forward pass, the accumulation, and beta
# of Diffusion-DPO and of SIPO and DPO-C&M.
TABLE_A1 = {"image": (1, 64, 5.0, 1.0), "video": (4, 8, 2.0, 0.02)}
COLUMN = {"sd15": "image", "sdxl": "image", "cogvideox_2b": "video", "cogvideox_5b": "video", "wan21_1_3b": "video"}


@pytest.mark.parametrize("method", ["dpo", "sipo", "dpo_cm"])
@pytest.mark.parametrize("model", COLUMN)
def test_published_settings(model, method):
    """Table A1; clip 0.1 (appendix F.1); the grid of Fig. 4."""
    batch_size, accumulation, dpo_beta, sipo_beta = TABLE_A1[COLUMN[model]]
    training, model_args = _published(f"{model}_{method}", "dpo" if method == "dpo" else "sipo")
    paper_beta = dpo_beta if method == "dpo" else sipo_beta
    assert training.beta == pytest.approx(to_diffusion_dpo_beta(paper_beta, "sipo_paper"))
    assert training.beta_convention == "diffusion_dpo" and training.learning_rate == 2e-5
    assert training.per_device_train_batch_size == batch_size
    assert training.gradient_accumulation_steps == accumulation
    assert training.fp16 and not training.bf16 and training.weight_decay == 0
    assert training.lr_scheduler_type == "constant"
    # The paper does not say that it trained a LoRA; all weights of the 5B model do not fit.
    assert (lora_config(model_args) is None) == (model != "cogvideox_5b")
    if method != "dpo":
        assert training.objective == method
        assert (training.clip_range, training.mask_threshold, training.importance_steps) == (0.1, None, 50)
        assert training.mask and training.reweight and training.weight_grad


def test_published_settings_of_poly_dpo():
    """ViPO: alpha 8 for SD1.5 on Pick-a-Pic v2; beta 1000 and 5e-10 per pair, probably for SDXL."""
    sd15, _ = _published("sd15_poly_dpo", "poly-dpo")
    assert sd15.poly_alpha == 8.0 and sd15.beta == 1000
    sdxl, _ = _published("sdxl_poly_dpo", "poly-dpo")
    pairs = 16 * sdxl.per_device_train_batch_size * sdxl.gradient_accumulation_steps
    assert sdxl.beta == 1000 and sdxl.learning_rate == pytest.approx(5e-10 * pairs) and sdxl.max_steps == 4000


def _published(name, method):
    config = ROOT / "examples" / "configs" / f"{name}.yaml"
    _, training, model = parse(method, ["--config", str(config), "--dataset_name", "x/y"])
    return training, model


def test_the_proximal_term_on_one_gpu_has_the_beta_of_diffusion_dpo():
    training, model = _published("sd15_dpo_proximal_single_gpu", "dpo")
    assert (training.beta, lora_config(model).r) == (_published("sd15_dpo", "dpo")[0].beta, 8)
    assert 0.6 <= training.proximal_kappa <= 1  # what docs/source/proximal.md says of pairs from elsewhere


def test_one_gpu_trains_a_lora_with_the_published_objective():
    config = ROOT / "examples" / "configs" / "sd15_sipo_single_gpu.yaml"
    _, training, model = parse("sipo", ["--config", str(config), "--dataset_name", "x/y"])
    assert lora_config(model).r == 8 and not training.fp16
    assert (training.objective, training.beta) == ("sipo", 1000.0)
    assert (training.clip_range, training.importance_steps) == (0.1, 50)
    assert training.sample_every_steps and len(training.sample_prompts) == 4
