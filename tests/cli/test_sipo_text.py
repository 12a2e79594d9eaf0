# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo sipo-text`: a language model from its files to its trained files, and what is said of mistakes."""

from pathlib import Path

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from tests.tiny.language_model import tiny_language_model, tiny_tokenizer
from tests.trainer.text_runs import text_pairs
from trl_sipo.cli.main import main
from trl_sipo.scripts.train_text import parse

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("text_*.yaml"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny language model with its tokenizer, and text preferences as Parquet, on disk."""
    folder = tmp_path_factory.mktemp("text")
    tiny_language_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "pairs").mkdir()
    text_pairs(8).to_parquet(folder / "pairs" / "train.parquet")
    text_pairs(4).to_parquet(folder / "pairs" / "test.parquet")
    return folder


def _config(material, folder, **options):
    settings = {
        "model_name_or_path": str(material / "base"),
        "dataset_name": str(material / "pairs"),
        "output_dir": str(folder / "out"),
        "learning_rate": "1e-2",  # what YAML makes of 1e-2
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        **options,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_it_trains_evaluates_saves_and_goes_on(is_lora, material, tmp_path, capsys):
    options = {"use_peft": True, "lora_target_modules": "all-linear"} if is_lora else {}
    argv = ["sipo-text", "--config", _config(material, tmp_path, eval_strategy="steps", eval_steps=1, **options)]
    assert main([*argv, "--clip_range", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "1 / w within [0.8, 1.2]" in printed and "eval_sipo/importance_weight" in printed
    kind = AutoPeftModelForCausalLM if is_lora else AutoModelForCausalLM
    trained = dict(kind.from_pretrained(tmp_path / "out").named_parameters())
    base = dict(AutoModelForCausalLM.from_pretrained(material / "base").named_parameters())
    assert (
        any("lora_B" in name and value.any() for name, value in trained.items())
        if is_lora
        else any(not value.equal(base[name]) for name, value in trained.items())
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SIPO" in card and str(material / "pairs") not in card
    assert main([*argv, "--max_steps", "3", "--save_steps", "1", "--resume_from_checkpoint", "true"]) == 0
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


MISTAKES = {
    "unknown key": ({"learning_rat": 1.0}, "learning_rat"),
    "key of diffusion models": ({"resolution": 512}, "resolution"),
    "refused": ({"loss_type": "ipo"}, "`loss_type="),
    "clip range": ({"clip_range": 1.5}, "clip_range"),
    "no data": ({"dataset_name": None}, "`dataset_name` is required"),
    "data not there": ({"dataset_name": "./nowhere"}, "./nowhere"),
    "split not there": ({"dataset_train_split": "trian"}, "trian"),
    "no model": ({"model_name_or_path": None}, "`model_name_or_path` is required"),
    "model not there": ({"model_name_or_path": "./nothing"}, "./nothing"),
    "no checkpoint": ({"resume_from_checkpoint": True}, "no checkpoint"),
    "tracker": ({"report_to": "wandbb"}, "Unknown tracker 'wandbb'"),
    "no log-probabilities": ({"sampling_policy": "recorded"}, "needs the columns"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_of_the_user_exit_with_2(case, material, tmp_path, capsys):
    options, message = MISTAKES[case]
    assert main(["sipo-text", "--config", _config(material, tmp_path, **options)]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and message in errors[errors.index("trl-sipo sipo-text: ") :]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_a_configuration_is_right(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    (line, *_) = (line for line in config.read_text(encoding="utf-8").splitlines() if "trl-sipo " in line)
    program, command, *argv = line.removeprefix("#").split()
    assert (program, command) == ("trl-sipo", "sipo-text") and str(config.relative_to(ROOT)) in argv
    data, training, model = parse(argv)
    assert data.dataset_name == "your/preferences" and model.use_peft
    assert training.output_dir.startswith("text-sipo")
