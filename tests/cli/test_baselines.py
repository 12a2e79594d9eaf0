# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo sft | kto | mapo` from files to a LoRA with a model card."""

import pytest

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import picture, preference_pairs
from trl_sipo.cli.main import COMMANDS, main
from trl_sipo.trainer.methods import METHODS


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny pipeline, pairs, and a table of images that are liked or not."""
    folder = tmp_path_factory.mktemp("material")
    tiny_stable_diffusion().save_pretrained(folder / "base")
    preference_pairs(4).to_parquet(folder / "pairs.parquet")
    (folder / "images").mkdir()
    for number in range(4):
        picture(number).save(folder / "images" / f"{number}.png")
    rows = "\n".join(f"a red cat,{number}.png,{str(number % 2 == 0).lower()}" for number in range(4))
    (folder / "images" / "train.csv").write_text(f"prompt,image,label\n{rows}\n")
    return folder


@pytest.mark.parametrize(
    ("method", "data", "title", "images"),
    [("sft", "images", "SFT", 2), ("kto", "images", "Diffusion-KTO", 4), ("mapo", "pairs.parquet", "MaPO", 4)],
)
def test_a_baseline_trains_from_files(method, data, title, images, material, tmp_path, capsys):
    options = {
        "model_name_or_path": material / "base",
        "dataset_name": material / data,
        "output_dir": tmp_path / "out",
        "use_peft": "true",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": "true",
        "save_strategy": "no",
        "report_to": "none",
    }
    assert main([method, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]) == 0
    printed = capsys.readouterr().out
    assert f"{title} on StableDiffusionPipeline" in printed and f"pairs {images}" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Method: {title}, from [" in card and ("beta = " in card) == (method != "sft")
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_every_method_has_a_command_and_every_training_command_a_method():
    trained = {name for name, (module, _) in COMMANDS.items() if module == "trl_sipo.scripts.train"}
    assert trained == METHODS.keys()


def test_pairs_are_asked_for_where_they_are_needed(material, tmp_path, capsys):
    argv = ["--model_name_or_path", str(material / "base"), "--dataset_name", str(material / "images")]
    assert main(["mapo", *argv, "--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none"]) == 2
    assert "DiffusionKTOTrainer" in capsys.readouterr().err
