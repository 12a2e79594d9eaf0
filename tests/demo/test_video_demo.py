# SPDX-License-Identifier: Apache-2.0
"""The video demo as a whole: pretraining, one run, the report and the command, on a handful of steps."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from trl_sipo.demo import demo as demo_module
from trl_sipo.demo.arm import DemoFiles, run_arm
from trl_sipo.demo.prepare import prepare_base, prepare_pairs
from trl_sipo.demo.report import write_report
from trl_sipo.demo.settings import VIDEO_FULL, VIDEO_QUICK
from trl_sipo.demo.summary import aggregate, verdict
from trl_sipo.demo.verifier import load_verifiers
from trl_sipo.demo.video import clips, pretrain, verifier_training
from trl_sipo.demo.video.clips import CLIPS
from trl_sipo.demo.video.coding import sample_clips
from trl_sipo.demo.video.model import LATENT_SHAPE, VIDEO_ASSETS, build_video_pipeline, load_video_pipeline
from trl_sipo.errors import ConfigurationError
from trl_sipo.scripts.demo import make_parser, run, settings_from

TINY = replace(
    VIDEO_QUICK,
    max_steps=2,
    eval_every=2,
    batch_size=4,
    num_pairs=12,
    num_held_out=4,
    samples_per_prompt=1,
    num_inference_steps=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two steps of SIPO, in this process."""
    files = DemoFiles(tmp_path_factory.mktemp("video"), VIDEO_ASSETS)
    pipeline, verifiers = CLIPS.load_pipeline(files.base_pipeline), load_verifiers(files.verifiers)
    prepare_pairs(pipeline, verifiers[0], TINY, "off_policy", files, CLIPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "NUM_REFERENCE_CLIPS", 60)
        base = prepare_base(pipeline, verifiers, TINY, files, CLIPS)
    return files, base, [run_arm("off_policy", "sipo", 0, TINY, files, CLIPS)]


def test_runs_start_from_the_base_and_move_it(finished):
    _, base, runs = finished
    for result in runs:
        first, last = result["records"]
        assert (first["step"], last["step"]) == (0, 2)
        assert first["accuracy"] == base["accuracy"] and first["held_out_accuracies"] == 0.5
        assert {"class_accuracy", "colour_accuracy", "direction_accuracy"} <= set(first)
        assert last["held_out_chosen"] != 0.0
        assert len(result["weight_curve"]) == len(CLIPS.curve_levels)
        # w rises with the noise: steps at low noise are the narrow ones.
        assert result["weight_curve"][0] < 0.1 < 0.9 < result["weight_curve"][-1]


def test_the_report_shows_the_frames_of_every_model(finished):
    files, base, runs = finished
    summary = {
        "command": "trl-sipo demo --video",
        "environment": {},
        "settings": {name: getattr(TINY, name) for name in TINY.__dataclass_fields__ if name != "parts"},
        "ceiling": demo_module.ceiling(files),
        "base": base,
        "parts": {"off_policy": {"methods": aggregate(runs, base, CLIPS)}},
    }
    summary["verdict"] = verdict(summary, CLIPS)
    assert "class, colour and direction" in summary["verdict"]["base"][1]
    page = write_report(summary, {"off_policy": runs}, files, CLIPS).read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    with Image.open(files.root / "figures" / "off_policy_samples.png") as sheet:
        # The name column, then two models of five frames each.
        assert sheet.width > 2 * 5 * 96


def test_a_handful_of_steps_writes_a_pipeline_judges_and_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "BANK_SIZE", 50)
    monkeypatch.setattr(verifier_training, "NUM_CLIPS", 20)
    monkeypatch.setattr(verifier_training, "NUM_TEST_CLIPS", 20)
    steps = {"--autoencoder-steps": 2, "--steps": 2, "--verifier-steps": 2, "--batch-size": 4, "--clips-per-prompt": 1}
    options = [str(part) for pair in steps.items() for part in pair]
    pretrain.main(["--output", str(tmp_path), "--threads", str(torch.get_num_threads()), *options])
    pipeline = load_video_pipeline(tmp_path / "pipeline")
    assert sample_clips(pipeline, ["a red bag moving up"], seed=0, num_inference_steps=2).shape == (1, 3, 5, 32, 32)
    assert len(load_verifiers(tmp_path / "verifier")) == 2
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert log["pipeline"]["command"].startswith("python -m trl_sipo.demo.video.pretrain --threads")
    assert set(log["samples"]["primary"]) == {"class", "colour", "direction", "all"}
    assert not (tmp_path / "pretrain_state").exists()


def test_an_interrupted_autoencoder_continues_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "RESUME_EVERY", 1)
    options = {"num_steps": 2, "batch_size": 2, "seed": 0}
    whole, stopped, resumed = (build_video_pipeline(0).vae for _ in range(3))
    pretrain.train_autoencoder(whole, **options, state=tmp_path / "whole.pt")
    save = pretrain.Training.save

    def save_and_stop(self, path):
        save(self, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.Training, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_autoencoder(stopped, **options, state=tmp_path / "stopped.pt")
    monkeypatch.setattr(pretrain.Training, "save", save)
    pretrain.train_autoencoder(resumed, **options, state=tmp_path / "stopped.pt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_training_sees_the_reconstruction_before_it_is_clipped():
    vae = build_video_pipeline(0).vae
    latents = 30 * torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in vae.decoder.conv_out.parameters():
            parameter *= 5
        raw, clipped = pretrain.reconstruct(vae, latents), vae.decode(latents).sample
    assert raw.abs().max() > 1
    assert torch.equal(raw.clamp(-1, 1), clipped)


def test_captions_are_padded_as_the_pipeline_does():
    pipeline = build_video_pipeline(0)
    texts = ["a red bag moving left", ""]
    with torch.no_grad():
        ours = pretrain.encode_text(pipeline, texts, pretrain.PADDED_LENGTH)
        theirs, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=512)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_flag_chooses_the_video_demo(tmp_path, monkeypatch):
    parser = make_parser()
    assert settings_from(parser.parse_args(["--video"])) == VIDEO_FULL
    assert settings_from(parser.parse_args(["--video", "--quick", "--max-steps", "7"])) == replace(
        VIDEO_QUICK, max_steps=7
    )
    called = {}

    def record(settings, files, medium, **options):
        called.update(settings=settings, files=files, medium=medium, **options)
        return {"verdict": {}, "num_runs_kept": 0, "seconds": 0}

    monkeypatch.setattr(demo_module, "run_demo", record)
    monkeypatch.chdir(tmp_path)
    run("demo", ["--video"])
    assert called["medium"] is CLIPS and called["settings"] == VIDEO_FULL
    assert called["files"].base == VIDEO_ASSETS and str(called["files"].root) == "demo_output/video"
    assert called["command"] == "trl-sipo demo --video"


def test_an_unknown_arm_of_the_video_demo_is_refused():
    with pytest.raises(ConfigurationError, match="ppo"):
        settings_from(make_parser().parse_args(["--video", "--arms", "ppo"]))


def test_shipped_log_says_how_the_weights_were_made_and_how_good_they_are():
    log = json.loads((VIDEO_ASSETS / "training_log.json").read_text())
    assert log["pipeline"]["command"].startswith("python -m trl_sipo.demo.video.pretrain")
    assert log["denoiser_loss_curve"][-1]["loss"] < log["denoiser_loss_curve"][0]["loss"] / 2
    for name in ("primary", "second"):
        assert log["verifiers"][name]["accuracy_on_real_test_photographs"]["reconstructed"]["all"] > 0.9
        assert log["samples"][name]["all"] > 0.8
