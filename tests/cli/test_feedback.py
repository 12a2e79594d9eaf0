# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo feedback`, from a saved model and prompts to pairs that `trl-sipo data check` finds sound."""

import json

import pytest

from tests.tiny_models import tiny_stable_diffusion
from trl_sipo.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_stable_diffusion().save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("a cat\na dog\na boat\na house\n")
    return folder


def feedback(model, output, *options):
    return main(
        ["feedback", "--model", f"base={model / 'base'}", "--output", str(output), "--device", "cpu"]
        + ["--prompts", str(model / "prompts.txt"), "--num_inference_steps", "1", "--height", "32", "--width", "32"]
        + ["--rewards", "tests.feedback.rewards:redness", "tests.feedback.rewards:brightness", *options]
    )


def test_pairs_are_made_and_sound(model, tmp_path, capsys):
    output = tmp_path / "out"
    assert feedback(model, output, "--weights", "redness=3", "brightness=1", "--held_out_share", "0.5") == 0
    said = capsys.readouterr().out
    report = json.loads((output / "feedback.json").read_text())
    assert report["pairs"] + report["held_out_pairs"] == 4 and report["held_out_pairs"] > 0
    assert report["settings"]["weights"] == {"redness": 3.0, "brightness": 1.0}
    assert "ranks opposed" in said and f"--dataset_name {output / 'pairs.parquet'}" in said
    check = ["data", "check", str(output / "pairs.parquet"), "--output", str(tmp_path / "check"), "--strict"]
    assert main(check) == 0
    assert f"{report['pairs']} pairs, 0 ties" in capsys.readouterr().out


def test_the_same_command_again_draws_nothing_and_gives_the_same_pairs(model, tmp_path):
    assert feedback(model, tmp_path) == 0
    pairs = (tmp_path / "pairs.parquet").read_bytes()
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").rglob("*.png")}
    assert feedback(model, tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").rglob("*.png")} == drawn
    assert (tmp_path / "pairs.parquet").read_bytes() == pairs


@pytest.mark.parametrize(
    "options, words",
    [
        (["--samples_per_prompt", "1"], "at least 2"),
        (["--weights", "redness"], "REWARD=WEIGHT"),
        (["--weights", "red=1"], "weights for ['red']"),
        (["--combine", "sum"], "pareto"),
        (["--held_out_share", "1"], "held_out_share=1.0"),
        (["--rewards", "pickscores"], "pickscore"),
        (["--model", "base"], "NAME=MODEL"),
    ],
)
def test_wrong_options_end_in_one_line_before_anything_is_drawn(model, tmp_path, capsys, options, words):
    assert feedback(model, tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not (tmp_path / "samples").exists()
