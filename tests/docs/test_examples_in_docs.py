# SPDX-License-Identifier: Apache-2.0
"""The examples of the documentation run."""

import json
import shlex
from typing import Any

import pytest
import torch

from tests.data.clips import write_video
from tests.docs.pages import SOURCE, blocks
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import Method, changed, logged, make_trainer, picture, preference_pairs, trained_weights
from trl_sipo.cli.main import main
from trl_sipo.errors import ConfigurationError


def _run(page: str, number: int, **replacements: str) -> dict[str, Any]:
    """The names that a page's Python block defines; `replacements` are made in its text and must all occur."""
    code = blocks(SOURCE / page, "python")[number].code
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {"__name__": "documentation"}
    exec(compile(code, page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def ipo():
    """The objective of add_an_objective.md, as a method of the trainers' tests."""
    names = _run("add_an_objective.md", 0)
    return Method("ipo", names["DiffusionIPOTrainer"], names["DiffusionIPOConfig"])


def test_the_example_objective_trains(ipo, tmp_path, capsys):
    trainer = make_trainer(ipo, tmp_path, margin=0.7)
    before = trained_weights(trainer)
    trainer.train()
    assert "Diffusion-IPO on" in capsys.readouterr().out
    loss = logged(trainer, "loss")
    assert loss[0] == pytest.approx(0.7**2)  # a fresh model has a logit of 0
    assert loss[1] != loss[0] and changed(before, trained_weights(trainer))
    trainer.create_model_card()
    assert "2310.12036" in (tmp_path / "README.md").read_text()


def test_the_example_objective_by_hand(ipo, tmp_path):
    trainer = make_trainer(ipo, tmp_path)
    logit = torch.tensor([0.0, 0.5, 2.0, float("inf")], requires_grad=True)
    keep = torch.tensor([True, True, True, False])
    loss = trainer.compute_pair_loss(logit, torch.ones(4), keep)
    loss.sum().backward()
    assert loss.tolist() == [0.25, 0.0, 2.25, 0.0]
    assert logit.grad.tolist() == [-1.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("options", [{"margin": 0.0}, {"label_smoothing": 0.1}], ids=str)
def test_the_example_objective_refuses_what_it_would_ignore(options, ipo, tmp_path):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        make_trainer(ipo, tmp_path, **options)


def test_the_example_hook(tmp_path):
    from tests.trainer.runs import SIPO

    band = _run("add_an_objective.md", 2)["BandTrainer"]
    trainer = make_trainer(SIPO, tmp_path, trainer_class=band)
    weights = torch.tensor([0.5, 0.9, 0.95, 0.9995])
    assert trainer.mask_timesteps(weights.log() + 1e-6).tolist() == [False, True, True, False]


def test_the_audits_of_the_documentation(tmp_path, capsys):
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    preference_pairs(8).to_parquet(tmp_path / "pairs.parquet")
    tiny = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(tmp_path / "base"),
        "your/preferences": str(tmp_path / "pairs.parquet"),
        "512": "32",
        "audit": str(tmp_path / "audit"),
    }
    commands = [
        shlex.split(block.code.replace("\\\n", " "))
        for page in ("quickstart.md", "sipo.md")
        for block in blocks(SOURCE / page, "bash")
        if block.code.startswith("trl-sipo audit")
    ]
    assert len(commands) == 2
    for program, command, *words in commands:
        assert program == "trl-sipo"
        few = ["--num_pairs", "2", "--on_policy", "2", "--num_levels", "2", "--num_inference_steps", "1"]
        assert main([command, *(tiny.get(word, word) for word in words), *few]) == 0
        assert "Masked: " in capsys.readouterr().out
    assert json.loads((tmp_path / "audit" / "weights.json").read_text())["settings"]["num_pairs"] == 2


def test_the_published_dataset_of_the_documentation(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / "images" / f"{number}.jpg")
    rows = [
        {"prompt": "a cat", "path1": "0.jpg", "path2": "1.jpg", "confidence": 0.97},
        {"prompt": "a dog", "path1": "2.jpg", "path2": "3.jpg", "confidence": 0.6},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    names = _run("data.md", 1, HPDv3=str(tmp_path))
    assert capsys.readouterr().out.split() == ["2", "1", "['prompt',", "'chosen',", "'rejected',", "'label']"]
    assert names["sure"]["chosen"][:] == [str(tmp_path / "images" / "0.jpg")]


def test_the_data_check_of_the_documentation(tmp_path, capsys):
    preference_pairs(4).to_parquet(tmp_path / "pairs.parquet")
    page = blocks(SOURCE / "data.md", "bash")
    (check,) = [shlex.split(block.code) for block in page if block.code.startswith("trl-sipo data check")]
    replaced = {"pairs": str(tmp_path / "pairs.parquet"), "data_check": str(tmp_path / "out")}
    assert main([replaced.get(word, word) for word in check[1:]]) == 0
    assert "4 pairs" in capsys.readouterr().out and (tmp_path / "out" / "report.html").is_file()


def test_the_video_data_of_the_documentation(tmp_path, capsys):
    for arm in ("chosen", "rejected"):
        write_video(tmp_path / arm / "0001.mp4", 20, rate=16)
        write_video(tmp_path / arm / "0002.webm", 27, rate=24)
    (tmp_path / "metadata.csv").write_text("id,prompt\n0001,a cat\n0002,a dog\n")
    names = _run("video_data.md", 0, **{'"pairs"': repr(str(tmp_path)), "(480, 832)": "(24, 32)"})
    assert names["pair"]["chosen_pixels"].shape == (3, 17, 24, 32)
    assert capsys.readouterr().out.splitlines() == [
        "18 {16.0: 2, 24.0: 2}",
        "a cat torch.Size([3, 17, 24, 32]) 16.0",
    ]
