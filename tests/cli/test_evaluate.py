# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo evaluate`, from saved models and a list of prompts to its report."""

import csv
import json
import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from tests.tiny_models import tiny_clip_tokenizer, tiny_stable_diffusion
from tests.trainer.runs import DPO, make_trainer, preference_pairs
from trl_sipo.cli.main import main
from trl_sipo.reporting.evaluation_tables import markdown, metrics_csv, p_value, with_interval
from trl_sipo.scripts.evaluate import file_names

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
REWARDS = ["tests.feedback.rewards:redness", "tests.feedback.rewards:brightness"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a base, of a LoRA on it, and of a model whose colours are shifted, prompts and held-out pairs."""
    root = tmp_path_factory.mktemp("models")
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(root / "base")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += torch.tensor([0.5, -0.2, -0.2])
    pipeline.save_pretrained(root / "red")
    trainer = make_trainer(DPO, root / "run", learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    (root / "prompts.txt").write_text("a cat\na dog\na <b>boat</b>\na house\n")
    preference_pairs(3, seed=4).to_parquet(root / "pairs.parquet")
    return root


def evaluate(models, output, *options):
    named = [f"base={models / 'base'}", f"red={models / 'red'}", f"lora={models / 'base'}+{models / 'run'}"]
    return main(
        ["evaluate", "--models", *named, "--output", str(output), "--prompts", str(models / "prompts.txt")]
        + ["--rewards", *REWARDS, "--num_inference_steps", "1", "--samples_per_prompt", "2", "--num_resamples", "200"]
        + ["--height", "32", "--width", "32", "--device", "cpu", *options]
    )


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    pairs = ["--dataset_name", str(models / "pairs.parquet"), "--dataset_split", "train", "--eval_noise_levels", "2"]
    assert evaluate(models, output, *pairs) == 0
    return output, json.loads((output / "evaluation.json").read_text())


def test_a_redder_model_wins_by_redness_and_is_told_so(evaluated):
    output, report = evaluated
    rows = {(row["model"], row["metric"]): row for row in report["metrics"]}
    assert rows["red", "redness"]["against_base"]["win_rate"]["estimate"] == 1.0
    assert rows["base", "redness"]["against_base"] is None
    # Four prompts cannot tell much: the interval and the test say so.
    assert rows["red", "redness"]["against_base"]["win_rate"]["low"] < 0.6
    assert rows["red", "redness"]["against_base"]["win_p_value"] == pytest.approx(2 / 16)
    assert report["variety"]["red"]["drift"]["estimate"] > 0
    assert report["rewards"]["brightness"]["higher_is_better"] is False


def test_implicit_preferences_are_there_for_each_candidate_and_level(evaluated):
    _, report = evaluated
    assert set(report["preferences"]) == {"red", "lora"}
    assert [row["time"] for row in report["preferences"]["lora"]] == [0.25, 0.75, None]
    # Another decoder draws other pictures, but its denoiser prefers nothing.
    assert report["preferences"]["red"][-1]["margin"]["estimate"] == 0
    assert report["preferences"]["lora"][-1]["margin"]["estimate"] != 0


def test_every_file_of_the_report_is_whole_and_says_the_same(evaluated):
    output, report = evaluated
    text, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    win_rate = with_interval(report["metrics"][1]["against_base"]["win_rate"], percent=True)
    assert win_rate in page and win_rate.replace("[", "\\[").replace("]", "\\]") in text
    rows = list(csv.DictReader((output / "metrics.csv").open()))
    assert (
        len(rows) == 6 and float(rows[1]["win_rate"]) == report["metrics"][1]["against_base"]["win_rate"]["estimate"]
    )
    assert "trl-sipo evaluate" in page and "<script" not in page
    for path in (output / "grids").glob("*.png"):
        assert Image.open(path).width > 100
    assert len(list((output / "grids").iterdir())) >= 2


def test_a_second_run_draws_and_scores_nothing(models, evaluated, monkeypatch, capsys):
    output, report = evaluated
    before = {path: path.stat().st_mtime_ns for path in (output / "samples").rglob("*.png")}
    assert evaluate(models, output) == 0
    assert {path: path.stat().st_mtime_ns for path in (output / "samples").rglob("*.png")} == before
    assert "win rate" in capsys.readouterr().out


def measured_pairs(output):
    return load_file(output / "errors" / "full.safetensors")["chosen"].shape[1]


def test_a_checkpoint_is_measured_on_a_cache_that_was_encoded_with_its_base(models, tmp_path):
    # Saved anew, its encoders are the same weights in other files.
    pipeline = StableDiffusionPipeline.from_pretrained(models / "base")
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1
    pipeline.save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "vae" / "config.json").open("a").write("\n")
    cache = tmp_path / "cache"
    encode = ["encode", "--model_name_or_path", str(models / "base"), "--resolution", "32", "--output", str(cache)]
    assert main([*encode, "--dataset_name", str(models / "pairs.parquet")]) == 0
    named = ["--models", f"base={models / 'base'}", f"full={tmp_path / 'full'}"]
    pairs = ["--dataset_name", str(cache), "--dataset_split", "train", "--eval_noise_levels", "2"]
    assert evaluate(models, tmp_path / "out", *named, *pairs) == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["preferences"]["full"][-1]["chosen_drift"]["estimate"] != 0
    assert measured_pairs(tmp_path / "out") == 3
    assert evaluate(models, tmp_path / "out", *named, *pairs, "--max_pairs", "2") == 0
    assert measured_pairs(tmp_path / "out") == 2
    # The errors are kept, but not when the cache holds other pairs by then.
    before = (tmp_path / "out" / "errors" / "full.safetensors").read_bytes()
    preference_pairs(3, seed=5).to_parquet(tmp_path / "others.parquet")
    shutil.rmtree(cache)
    assert main([*encode, "--dataset_name", str(tmp_path / "others.parquet")]) == 0
    assert evaluate(models, tmp_path / "out", *named, *pairs, "--max_pairs", "2") == 0
    assert (tmp_path / "out" / "errors" / "full.safetensors").read_bytes() != before
    # One with another VAE cannot use it, and says so.
    assert evaluate(models, tmp_path / "other", "--models", named[1], f"red={models / 'red'}", *pairs) == 2


def test_models_that_sample_in_another_way_are_named(models, tmp_path, capsys):
    pipeline = StableDiffusionPipeline.from_pretrained(models / "base")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "euler")
    named = ["--models", f"base={models / 'base'}", f"euler={tmp_path / 'euler'}"]
    assert evaluate(models, tmp_path / "out", *named) == 0
    assert "euler was drawn otherwise than base" in capsys.readouterr().out
    assert "EulerDiscreteScheduler" in (tmp_path / "out" / "report.html").read_text()


def test_variety_may_be_measured_by_clip(models, tmp_path, capsys):
    model = CLIPModel(CLIPConfig(text_config=SMALL, vision_config={**SMALL, "image_size": 16, "patch_size": 8}))
    model.save_pretrained(tmp_path / "clip")
    tiny_clip_tokenizer().save_pretrained(tmp_path / "clip")
    assert evaluate(models, tmp_path / "out", "--features", f"clip:{tmp_path / 'clip'}") == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["features"] == f"image embeddings of {tmp_path / 'clip'}"
    assert 0 < report["variety"]["red"]["base_spread"] < 2, "embeddings have length 1"


def test_a_missing_lora_is_told_before_the_base_is_drawn(models, tmp_path, capsys):
    named = ["--models", f"base={models / 'base'}", f"tuned={models / 'base'}+{tmp_path / 'nowhere'}"]
    assert evaluate(models, tmp_path / "out", *named) == 2
    assert "There is no LoRA" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--models", "base=x"], "the base first"),
        (["--models", "base=./nowhere", "tuned=./nowhere"], "./nowhere"),
        (["--features", "dino"], "pixels, clip or clip:MODEL"),
        (["--features", "clip:./nowhere"], "./nowhere"),
        (["--beta", "0"], "`--beta` must be a positive number"),
        (["--num_shown", "0"], "`--num_shown` must be at least 1"),
        (["--level", "1.5"], "0 < level < 1"),
        (["--reward_options", '{"pickscore": {}}'], "pickscore"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--samples_per_prompt", "0"], "samples_per_prompt"),
    ],
)
def test_wrong_options_end_in_one_line_before_anything_is_written(models, tmp_path, capsys, options, words):
    assert evaluate(models, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_texts_of_others_stay_text():
    report = {
        "title": "<b>x",
        "base": "b",
        "metrics": [
            {
                "model": "=1+1",
                "metric": "a|b",
                "category": None,
                "mean": {"estimate": 0.5, "low": None, "high": 1.0, "level": 0.95},
                "against_base": None,
                "corrected_win_p_value": None,
            }
        ],
        "categories": [],
        "variety": {},
        "preferences": {},
        "rewards": {},
        "settings": {"level": 0.95},
        "features": "f",
        "beta": 1.0,
        "command": "trl-sipo '`a\n## b`'",
    }
    assert "\n'=1+1,a|b,,0.5,,1.0," in metrics_csv(report)
    assert "| a\\|b | =1+1 | 0.5 \\[-, 1\\] |" in markdown(report)
    assert markdown(report).startswith("# \\<b\\>x\n") and "\n    trl-sipo '`a\n    ## b`'\n" in markdown(report)
    assert (p_value(0.0004), p_value(0.25), p_value(None)) == ("< 0.001", "0.250", "-")


def test_files_of_rewards_whose_names_differ_in_forbidden_characters_are_two():
    long = "process:" + "a" * 100
    names = file_names(["a/b", "a:b", "a_b", long, long + "b"])
    assert len(set(names.values())) == 5 and names["a/b"] == "a_b"
    assert all("/" not in name and ":" not in name for name in names.values())
