# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit beta` on the demo's model, for which good and bad betas are known, and on tiny pipelines."""

import json

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.data.clips import write_video
from tests.tiny.wan import tiny_wan
from trl_sipo.adapters import adapter_for
from trl_sipo.cli.main import main
from trl_sipo.demo.fashion import ASSETS, split_prompts
from trl_sipo.demo.model import load_pipeline_assets
from trl_sipo.demo.pairs import off_policy_pairs
from trl_sipo.demo.verifier import load_verifiers

LEVELS = 10


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of photographs as the demo trains on, in a folder."""
    folder = tmp_path_factory.mktemp("pairs")
    made = off_policy_pairs(load_verifiers()[0], split_prompts()[0][::3], pairs_per_prompt=2, seed=0)
    made.to_parquet(folder / "train.parquet")
    return folder


def _argv(pairs, *options, model=ASSETS / "pipeline", num_pairs=6):
    paths = ["--model_name_or_path", str(model), "--dataset_name", str(pairs)]
    return ["audit", "beta", *paths, "--num_pairs", str(num_pairs), "--num_levels", str(LEVELS), *options]


def _report(argv, folder):
    assert main([*argv, "--output", str(folder)]) == 0
    return json.loads((folder / "beta.json").read_text())


def test_a_bad_beta_is_called_so_on_the_model_of_the_demo(pairs, tmp_path, capsys):
    """Of reports/demo and reports/baselines: at 2 every run collapsed, the best were 200 to 5000."""
    report = _report(_argv(pairs, "--beta", "2", "--betas", "20", "200", "2000", "5e6"), tmp_path)
    printed = capsys.readouterr().out
    assert report["given"] == {"beta": 2, "verdict": "far_too_small"}
    assert "FAR TOO SMALL" in report["reading"][0] and report["reading"][0] in printed
    assert "Taken as `beta_convention=sipo_paper" in printed  # 2000
    rows = {row["beta"]: row for row in report["betas"]}
    words = {beta: row["verdict"] for beta, row in rows.items()}
    assert words[2] == words[20] == "far_too_small" and words[2000] == "good" and words[5e6] == "far_too_large"
    assert 150 < report["range"]["low"] < 600 and 3000 < report["range"]["high"] < 12000  # around the best ones

    for row in rows.values():
        shares = list(row["saturated"].values())
        assert shares == sorted(shares) and 0 <= shares[0] <= shares[-1] <= 1
    assert rows[20]["saturated"]["0.2"] < 0.1 < 0.6 < rows[2000]["saturated"]["0.2"]
    drifts = [row["let_go_at_drift"] * beta for beta, row in rows.items()]
    assert drifts == pytest.approx([drifts[0]] * len(rows))
    scales = [row["scale"] for row in report["levels"]]
    assert len(scales) == LEVELS and scales == sorted(scales, reverse=True) and scales[0] > 20 * scales[-1]
    assert report["conversions"]["low"]["sipo_paper"] == pytest.approx(report["range"]["low"] / 1000)
    assert report["settings"]["latent_dims"] == 4 * 8 * 8
    assert (tmp_path / "beta.png").read_bytes()[:4] == b"\x89PNG" and "<h1>" in (tmp_path / "beta.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "word", "said"),
    [
        (("--beta", "2000"), "good", "lies in the recommended range"),
        (("--beta", "2", "--beta_convention", "sipo_paper"), "good", "beta = 2000 lies in"),
        (("--beta", "5000", "--beta_convention", "sipo_paper"), "far_too_large", "FAR TOO LARGE"),
        (("--beta", "0.02"), "far_too_small", "FAR TOO SMALL"),
    ],
    ids=["best", "converted", "converted twice", "the paper's of video"],
)
def test_verdicts_on_the_model_of_the_demo(options, word, said, pairs, tmp_path, capsys):
    report = _report(_argv(pairs, *options, num_pairs=16), tmp_path)
    assert report["given"]["verdict"] == word and said in report["reading"][0]
    is_converted_twice = options[-1] == "sipo_paper" and word != "good"
    assert ("Taken as `beta_convention=diffusion_dpo" in capsys.readouterr().out) == is_converted_twice


def test_an_adapter_has_real_margins(pairs, tmp_path, capsys):
    """Of weights turned at random: no margin to speak of at a small beta, and all saturated at a huge one."""
    adapter = adapter_for(load_pipeline_assets())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        adapter.save_lora(get_peft_model(adapter.denoiser, config), tmp_path / "lora")
    options = ("--adapter", str(tmp_path / "lora"), "--betas", "0.001", "1e9")
    report = _report(_argv(pairs, *options, num_pairs=4), tmp_path / "report")
    assert [row["adapter_saturated"] for row in report["betas"]] == [0, 1]
    found = report["adapter"]
    assert abs(found["chosen_drift"]["estimate"]) > 1e-4 and 0 <= found["accuracy"]["estimate"] <= 1
    mean = sum(found["margin_by_level"]) / LEVELS
    assert report["betas"][1]["adapter_margin"] == pytest.approx(1e9 * mean, rel=1e-6)
    assert "The adapter has moved the error by" in capsys.readouterr().out


def test_clips(tmp_path):
    """And a flow model, whose levels are sigmas."""
    tiny_wan().save_pretrained(tmp_path / "wan")
    videos = [str(write_video(tmp_path / f"{i}.mp4", 9, size=(32, 32), first=3 * i)) for i in range(4)]
    rows = {"prompt": ["a red cat", "two dogs"], "chosen": videos[:2], "rejected": videos[2:]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    options = ("--resolution", "32", "--num_frames", "5", "--beta", "2000")
    argv = _argv(tmp_path / "train.parquet", *options, model=tmp_path / "wan", num_pairs=2)
    report = _report(argv, tmp_path / "report")
    assert report["settings"]["num_frames"] == 5 and "sigma" in report["levels"][0]
    # An untrained model's errors are near 1.
    assert report["given"]["verdict"] in ("good", "rather_large", "far_too_large")
    # Of a flow model neither end need be the extreme one, which is looked for.
    scales = [level["scale"] for level in report["levels"]]
    (words,) = [sentence for sentence in report["reading"] if sentence.startswith("The scale is largest")]
    for place in (scales.index(max(scales)), scales.index(min(scales))):
        assert f"{scales[place]:.2g}, at sigma {report['levels'][place]['sigma']:.4f}" in words


MISTAKES = {
    "zero": (("--beta", "0"), "beta=0.0 must be positive"),
    "infinite": (("--betas", "1", "inf"), "must be positive and finite"),
    "lonely": (("--beta_convention", "flow"), "give one"),
    "adapter": (("--adapter", "./nothing"), "There is no LoRA './nothing'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_exit_with_2_in_one_line(case, pairs, capsys):
    options, message = MISTAKES[case]
    assert main(_argv(pairs, *options)) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("trl-sipo audit: ")]
    assert message in line and "Forward passes" not in errors
