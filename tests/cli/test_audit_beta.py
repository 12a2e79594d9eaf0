# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit beta` on the demo's model, for which good and bad betas are known, and on tiny pipelines."""

import json

import datasets
import numpy as np
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
from trl_sipo.errors import DatasetError
from trl_sipo.evaluation.kappa_choice import LabelNoise
from trl_sipo.evaluation.statistics import Interval
from trl_sipo.scripts import audit_beta, audit_kappa

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
    assert "kappa" not in report and "roximal" not in printed, "nothing was asked of it"
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


# ---------------------------------------------------------------------------------------------------- proximal term


def _with_columns(pairs, folder, **columns):
    """The same pairs with more columns, as long as they are."""
    rows = datasets.Dataset.from_parquet(str(pairs / "train.parquet"), cache_dir=str(folder / "cache"))
    for name, values in columns.items():
        rows = rows.add_column(name, [values[i % len(values)] for i in range(len(rows))])
    rows.to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def test_a_kappa_is_recommended_and_another_one_judged(pairs, tmp_path, capsys):
    """0.6 = 1/2 + 1 / (12 * 0.8333), and 1 wins 1/2 + 1/12; a small beta is no fault then."""
    options = ("--win_rate", "0.6", "--proximal_kappa", "1", "--beta", "2")
    report = _report(_argv(pairs, *options, num_pairs=2), tmp_path)
    found, printed = report["kappa"], capsys.readouterr().out
    assert found["wanted"]["kappa"] == pytest.approx({"estimate": 5 / 6, "low": 5 / 6, "high": 5 / 6})
    assert found["given"]["win_rate"]["estimate"] == pytest.approx(7 / 12) and found["given"]["optimum"] == "always"
    assert found["noise"] == [
        {"estimate": 0.0, "low": 0.0, "high": 0.0, "source": "assumed", "name": "", "num_pairs": 0}
    ]
    sentences = [
        "To win 60% against the base model: proximal_kappa = 0.833, for pairs drawn from it.",
        "proximal_kappa = 1 has an optimum whatever the pairs are; for pairs drawn from the model it wins 58.3% "
        "against the base model.",
    ]
    place = report["reading"].index(sentences[0])
    assert report["reading"][place : place + 2] == sentences and "small beta has an optimum too" in printed
    assert "pairs of two samples that the model itself drew" in report["reading"][-1]
    page = (tmp_path / "beta.html").read_text()
    for text in (*sentences, "Proximal term", "0.833 (wanted)", "1 (given)"):
        assert text in printed and text in page
    rows = {row["kappa"]: row for row in found["rows"]}
    assert rows[0.25]["win_rate"] is None and rows[0.25]["optimum"] == "none"
    assert rows[0.5]["win_rate_by_rounds"] == pytest.approx({"2": 0.8, "3": 8 / 9})


def test_a_win_rate_that_no_kappa_reaches_has_ways_out(pairs, capsys):
    """What two rounds give at 1/2 is 0.8; with 0.25 no optimum is promised."""
    options = ("--win_rate", "0.75", "--proximal_kappa", "0.25", "--label_noise", "0")
    assert main(_argv(pairs, *options, num_pairs=1)) == 0
    printed = capsys.readouterr().out
    assert "NO KAPPA WITH AN OPTIMUM WINS 75%" in printed and "it is 66.7% at the most" in printed
    assert "2 rounds with proximal_kappa = 0.6" in printed and "stop it by held-out pairs" in printed
    assert "proximal_kappa = 0.25 is BELOW 0.5: where less than 0.25 of the comparisons are won" in printed
    assert "Assumed, as given: 0.0% of the labels are turned" in printed


def test_votes_of_the_data_tell_how_noisy_labels_are(pairs, tmp_path, capsys):
    """A quarter of the votes is against the majority, so that half of the win is left; scores that agree wait."""
    columns = {"label": [0.8, 0.3, 0.75], "chosen_judge": [2.0, 1.0, 2.0], "rejected_judge": [1.0, 2.0, 1.0]}
    data = _with_columns(pairs, tmp_path, **columns)
    report = _report(_argv(data, "--win_rate", "0.55", "--proximal_kappa", "1", num_pairs=2), tmp_path / "report")
    found = report["kappa"]
    votes, judge = found["noise"]
    assert (votes["source"], judge["source"], judge["name"], judge["estimate"]) == ("labels", "scores", "judge", 0.0)
    assert votes["estimate"] == pytest.approx(0.25, abs=0.01) and votes["low"] < votes["estimate"] < votes["high"]
    assert votes["num_pairs"] == judge["num_pairs"] > 20
    keep = 1 - 2 * votes["estimate"]
    wanted, given = found["wanted"]["kappa"], found["given"]
    assert wanted["estimate"] == pytest.approx(keep * 5 / 3) and wanted["low"] < wanted["estimate"] < wanted["high"]
    assert given["win_rate"]["estimate"] == pytest.approx(0.5 + keep / 12)
    assert given["win_rate_by_such_judges"] == pytest.approx(0.5 + keep**2 / 12)
    printed = capsys.readouterr().out
    assert "of the votes are against their pair's majority" in printed and "by such judges" in printed
    assert "Not gone by: labels that contradict judge 0.0% [" in printed


def test_scores_of_the_data_tell_how_noisy_labels_are(pairs, tmp_path, capsys):
    """Every fourth label contradicts "near", every second "far": the nearer one is gone by."""
    columns = {"near_chosen": [1.0, 1.0, 1.0, 0.0], "near_rejected": [0.0, 0.0, 0.0, 1.0]}
    columns |= {"far_chosen": [1.0, 0.0], "far_rejected": [0.0, 1.0]}
    report = _report(_argv(_with_columns(pairs, tmp_path, **columns), "--win_rate", "0.6", num_pairs=1), tmp_path)
    first, second = report["kappa"]["noise"]
    assert (first["name"], second["name"]) == ("near", "far")
    assert first["estimate"] == pytest.approx(0.25, abs=0.01) and second["estimate"] == pytest.approx(0.5, abs=0.01)
    assert report["kappa"]["wanted"]["kappa"]["estimate"] == pytest.approx(5 / 6 * (1 - 2 * first["estimate"]))
    assert report["kappa"]["wanted"]["optimum"] == "none", (
        "0.42, and with the least noise that is likely there is none"
    )
    printed = capsys.readouterr().out
    assert (
        "the labels contradict the scores 'near' in 25" in printed
        and "That is below 0.5, and has an optimum" in printed
    )


@pytest.mark.parametrize(
    ("kappa", "noise", "words"),
    [
        (0.0, 0.0, "switches the term off"),
        (0.4, 0.0, "BELOW 0.5: where less than 0.1 of the comparisons are won, samples are pushed away, the farther"),
        (0.499, 0.0, "BELOW 0.5: where less than 0.001 of the comparisons"),
        (0.4, 0.2, "if all are as noisy as the labels"),
        (
            0.5,
            0.0,
            "is the least that has an optimum for pairs drawn from the model, whatever their labels, and wins 66.",
        ),
        (0.5, 0.0, "For pairs from elsewhere take more."),
        (0.51, 0.0, "has an optimum whatever the pairs are; for pairs drawn from the model it wins 66.3%"),
        (1.0, 0.6, "known to win: the labels are no better than chance"),
    ],
)
def test_what_is_said_of_a_kappa(kappa, noise, words):
    found = LabelNoise(Interval(noise, noise, noise), "scores", "judge", 100)
    assert words in audit_kappa.given_words(audit_kappa.kappa_row(kappa, found), found)


def test_labels_that_are_none_are_said():
    arguments = audit_beta.make_parser().parse_args(_argv("pairs", "--win_rate", "0.6")[2:])
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["x"], "rejected": ["y"], "label": [1.5]})
    with pytest.raises(DatasetError, match="row 0, column 'label'"):
        audit_kappa.label_noises(arguments, rows, [])


def test_of_very_many_pairs_evenly_spaced_ones_are_read():
    label = np.where(np.arange(25_000) < 12_500, 0.9, 0.7)
    same = ["x"] * len(label)
    prompts = [f"prompt {i // 50}" for i in range(len(label))]
    rows = datasets.Dataset.from_dict({"prompt": prompts, "chosen": same, "rejected": same, "label": label})
    arguments = audit_beta.make_parser().parse_args(_argv("pairs", "--win_rate", "0.6")[2:])
    (noise,) = audit_kappa.label_noises(arguments, rows, [])
    assert noise.num_pairs == 10_000 and noise.share.estimate == pytest.approx(0.2)


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


KAPPA_MISTAKES = {
    "one half": (("--win_rate", "0.5"), "win_rate=0.5 must lie between 0.5"),
    "percent": (("--win_rate", "60"), "win_rate=60.0 must lie between 0.5"),
    "win rate nan": (("--win_rate", "nan"), "win_rate=nan must lie"),
    "negative": (("--proximal_kappa", "-0.5"), "proximal_kappa=-0.5 must be zero or positive"),
    "kappa nan": (("--proximal_kappa", "nan"), "proximal_kappa=nan must be zero or positive"),
    "infinite": (("--proximal_kappa", "inf"), "proximal_kappa=inf must be zero or positive, and finite"),
    "noise": (("--win_rate", "0.6", "--label_noise", "0.5"), "label_noise=0.5 is the share of labels"),
    "lonely noise": (("--label_noise", "0.1"), "give `--win_rate` or `--proximal_kappa`"),
}


@pytest.mark.parametrize("case", KAPPA_MISTAKES)
def test_mistakes_about_the_proximal_term_are_told_before_anything_is_loaded(case, capsys):
    """Neither model nor data are there."""
    options, message = KAPPA_MISTAKES[case]
    assert main(_argv("no/data", *options, model="no/model")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-sipo audit: ")]
    assert message in line and "no/" not in line
