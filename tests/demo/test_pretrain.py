# SPDX-License-Identifier: Apache-2.0
"""The script that makes the shipped weights, on a handful of steps."""

import json

import pytest
import torch

from trl_sipo.demo import pretrain, training
from trl_sipo.demo.fashion import ASSETS, all_prompts
from trl_sipo.demo.latents import decode, encode
from trl_sipo.demo.model import build_pipeline, load_pipeline_assets
from trl_sipo.demo.sampling import sample_images
from trl_sipo.demo.verifier import load_verifiers


def run(output, *extra: str) -> None:
    steps = ["--autoencoder-steps", "2", "--verifier-steps", "2", "--batch-size", "4", "--images-per-prompt", "1"]
    threads = ["--threads", str(torch.get_num_threads())]
    pretrain.main(["--output", str(output), *steps, *threads, *extra])


def test_a_handful_of_steps_writes_a_pipeline_judges_and_a_log(few_photographs, tmp_path):
    run(tmp_path, "--steps", "3")
    pipeline = load_pipeline_assets(tmp_path / "pipeline")
    assert sample_images(pipeline, ["a red bag"], seed=0, num_inference_steps=2).shape == (1, 3, 32, 32)
    assert len(load_verifiers(tmp_path / "verifier")) == 2
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert log["pipeline"]["command"].startswith("python -m trl_sipo.demo.pretrain --device cpu")
    assert log["pipeline"]["machine"].startswith("CPU, ")
    assert {"primary", "second"} <= set(log["verifiers"])
    assert set(log["samples"]["guidance_1.0"]["second"]) == {"class", "colour", "both", "log_prob"}
    assert not (tmp_path / "pretrain_state").exists()

    before = [judge.class_head.weight.clone() for judge in load_verifiers(tmp_path / "verifier")]
    run(tmp_path, "--verifiers-only", "--seed", "1")
    after = [judge.class_head.weight for judge in load_verifiers(tmp_path / "verifier")]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    renewed = json.loads((tmp_path / "training_log.json").read_text())
    assert renewed["pipeline"] == log["pipeline"]
    assert "--verifiers-only" in renewed["verifiers"]["command"]


def test_an_interrupted_denoiser_continues_exactly(few_photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "RESUME_EVERY", 2)
    options = {"num_steps": 4, "batch_size": 4, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}
    whole, stopped, resumed = build_pipeline(0), build_pipeline(0), build_pipeline(0)
    pretrain.train_denoiser(whole, **options, state_file=tmp_path / "whole.pt")
    real_save = pretrain.Training.save

    def save_and_stop(self, path):
        real_save(self, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.Training, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_denoiser(stopped, **options, state_file=tmp_path / "stopped.pt")
    monkeypatch.setattr(pretrain.Training, "save", real_save)
    pretrain.train_denoiser(resumed, **options, state_file=tmp_path / "stopped.pt")
    for a, b in zip(whole.unet.parameters(), resumed.unet.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_autoencoder_is_scaled_to_unit_latents_and_codes_both_ways(few_photographs):
    vae = build_pipeline(0).vae
    log = pretrain.train_autoencoder(vae, num_steps=3, batch_size=8, seed=0, device="cpu")
    assert log[-1]["step"] == 3
    images = pretrain.random_tints(pretrain.load_split("generator").images, torch.Generator().manual_seed(0))
    mean, std = encode(vae, images)
    assert mean.shape == std.shape == (80, 4, 8, 8)
    assert mean.std().item() == pytest.approx(1, rel=0.1)
    assert decode(vae, mean).shape == images.shape


def test_learning_rate_warms_up_and_decays():
    rates = [training.learning_rate_at(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[-1] == pytest.approx(0.02, abs=1e-4)


def test_weight_average_of_constant_weights_is_the_weights_and_lags_behind_a_jump():
    layer = torch.nn.Linear(2, 2)
    average = training.WeightAverage([layer], decay=0.5)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1.0
    for _ in range(20):
        average.update()
    assert torch.allclose(average.averages[0][0], start + 1, atol=1e-4)
    with torch.no_grad():
        layer.weight += 1.0
    average.update()
    average.copy_to_modules()
    assert torch.allclose(layer.weight, start + 1.5, atol=1e-4)


def test_captions_end_with_the_empty_one():
    tokens = pretrain.tokenize(build_pipeline(0), all_prompts())
    assert tokens.shape == (65, 16)
    assert tokens[-1].unique().numel() == 2


def test_shipped_log_says_how_the_weights_were_made():
    log = json.loads((ASSETS / "training_log.json").read_text())
    for part in ("pipeline", "verifiers"):
        assert {"command", "machine", "versions", "wall_seconds"} <= set(log[part])
    assert log["denoiser_loss_curve"][-1]["loss"] < log["denoiser_loss_curve"][0]["loss"] / 2
    for name in ("primary", "second"):
        assert log["verifiers"][name]["accuracy_on_real_test_photographs"]["reconstructed"]["both"] > 0.85
