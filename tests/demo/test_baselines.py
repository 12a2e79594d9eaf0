# SPDX-License-Identifier: Apache-2.0
"""The comparison of all methods: every arm trains, strengths are chosen by the rule, the table says what was run."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from PIL import Image

from trl_sipo.adapters import adapter_for
from trl_sipo.demo.arm import DemoFiles, make_config, run_arm
from trl_sipo.demo.baselines import BASELINES, STRENGTHS, Comparison, choose, default_name, run_baselines
from trl_sipo.demo.baselines_report import markdown_table
from trl_sipo.demo.baselines_summary import against_base, collapses, leader, sweep_sentences, verifier_gap
from trl_sipo.demo.demo import prepare
from trl_sipo.demo.fashion import all_prompts
from trl_sipo.demo.images import IMAGES
from trl_sipo.demo.latents import decode
from trl_sipo.demo.pairs import to_png
from trl_sipo.demo.sampling import prompt_ids
from trl_sipo.demo.settings import ARMS, Part, find_arm
from trl_sipo.demo.summary import spread
from trl_sipo.demo.verifier import load_verifiers
from trl_sipo.errors import ConfigurationError
from trl_sipo.scripts.demo import comparison_from, make_parser

TINY = Comparison(
    replace(
        BASELINES.settings,
        max_steps=2,
        eval_every=2,
        batch_size=4,
        num_pairs=24,
        num_held_out=6,
        samples_per_prompt=1,
        num_inference_steps=3,
    ),
    {
        "off_policy": ("ipo", "hinge", "robust", "kto", "mapo", "sft"),
        "trajectories": ("d3po",),
        "self_play": ("spin",),
    },
    strengths={"mapo": (0.1, 1.0)},
    seeds=(0,),
    sweep_seed=7,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The data of the comparison."""
    files = DemoFiles(tmp_path_factory.mktemp("baselines"), IMAGES.base)
    files.root.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    parts = tuple(Part(source, arms, TINY.seeds) for source, arms in TINY.arms.items())
    prepare(replace(TINY.settings, parts=parts), files, IMAGES, workers=1)
    torch.set_num_threads(threads)
    return files


@pytest.fixture(scope="module")
def finished(files):
    """Every run of the comparison, and what was made of them."""
    chosen = {("off_policy", arm): default_name(arm) for arm in TINY.arms["off_policy"]}
    chosen |= {("trajectories", "d3po"): default_name("d3po"), ("self_play", "spin"): default_name("spin")}
    for settings in (TINY.sweep, TINY.reported(chosen), TINY.reported(chosen | {("off_policy", "mapo"): "mapo@1"})):
        for part in settings.parts:
            for run in part.runs:
                if not files.result(part.source, *run).is_file():
                    run_arm(part.source, *run, settings, files, IMAGES)
    return files, run_baselines(TINY, files, IMAGES, workers=1, command="trl-sipo demo --baselines")


def test_every_arm_was_trained_and_measured(finished):
    _, summary = finished
    base, rows = summary["base"], summary["rows"]
    assert [row["method"] for row in rows if row["is_default"]] == [arm for arms in TINY.arms.values() for arm in arms]
    for row in rows:
        final = row["final"]
        assert {"accuracy", "second_accuracy", "reward", "frechet_distance", "diversity"} <= set(final)
        # Two steps move the model, and no further than that.
        assert final["frechet_distance"]["mean"] != base["frechet_distance"]
        assert abs(final["accuracy"]["mean"] - base["accuracy"]) < 0.3
        assert row["step_seconds"]["mean"] > 0 and row["num_seeds"] == 1
    assert [row["method"] for row in rows if "held_out_accuracies" not in row["final"]] == ["sft"]


def test_the_costs_are_those_of_the_methods(finished):
    _, summary = finished
    passes = {row["method"]: (row["policy_passes"], row["reference_passes"]) for row in summary["rows"]}
    of_pairs = dict.fromkeys(("ipo", "hinge", "robust", "kto", "d3po", "spin"), (2, 2))
    assert passes == {**of_pairs, "mapo": (2, 0), "sft": (1, 0)}


def test_runs_that_are_there_are_kept_and_the_strength_is_chosen_from_the_sweep(finished):
    files, summary = finished
    mapo = {row["arm"]: row for row in summary["rows"] if row["method"] == "mapo"}
    (best,) = [name for name, row in mapo.items() if row["is_best"]]
    assert set(mapo) == {"mapo@0.1", best} and mapo["mapo@0.1"]["is_default"]
    records = {name: record for name, record in mapo[best]["sweep"].items()}
    assert list(records) == ["0.1", "1"]
    assert best.removeprefix("mapo@") == choose(records, num_samples=64)
    for name, record in records.items():
        result = json.loads(files.result("off_policy", f"mapo@{name}", TINY.sweep_seed).read_text())
        assert result["records"] == [record]
    # 2 runs of the sweep, 8 arms, and MaPO at what was chosen where that is not the default.
    assert summary["num_runs_kept"] == 2 + 8 + (best != "mapo@0.1")


def test_the_report_opens_from_disk_with_table_and_figures(finished):
    files, summary = finished
    assert json.loads((files.root / "summary.json").read_text())["rows"] == json.loads(json.dumps(summary["rows"]))
    table = (files.root / "table.md").read_text().splitlines()
    assert len(table) == 3 + len(summary["rows"]) and len({line.count("|") for line in table}) == 1
    assert "Diffusion-KTO" in (files.root / "table.md").read_text()
    names = {"trade_off", "sweep", *(f"{source}_samples" for source in TINY.arms)}
    assert {path.stem for path in (files.root / "figures").iterdir()} == names
    for name in names:
        with Image.open(files.root / "figures" / f"{name}.png") as figure:
            figure.load()
            assert min(figure.size) > 200
    page = (files.root / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(names)
    assert all(sentence.split(":")[0] in page for sentence in summary["verdict"]["off_policy"])


def test_trajectories_end_in_images_that_the_verifier_ranks(files):
    rows = Dataset.from_parquet(str(files.train_pairs("trajectories")))
    assert 0 < len(rows) <= TINY.settings.num_pairs
    verifier, vae = (
        load_verifiers(files.verifiers)[0],
        adapter_for(IMAGES.load_pipeline(files.base_pipeline)).pipeline.vae,
    )
    prompts = {prompt.text: prompt for prompt in all_prompts()}
    ids = prompt_ids([prompts[text] for text in rows["prompt"]])
    scores = []
    for column in ("chosen_latents", "rejected_latents"):
        states = torch.tensor(rows[column])
        assert states.shape == (len(rows), TINY.settings.num_inference_steps + 1, 4, 8, 8)
        scores.append(verifier.scores(decode(vae, states[:, -1]), *ids)["log_prob"])
    assert (scores[0] - scores[1]).min() >= 0.05 - 1e-4


def test_self_play_sets_photographs_against_samples_of_the_base(files):
    rows = Dataset.from_parquet(str(files.train_pairs("self_play")))
    verifier = load_verifiers(files.verifiers)[0]
    prompts = {prompt.text: prompt for prompt in all_prompts()}
    ids = prompt_ids([prompts[text] for text in rows["prompt"]])
    photographs = torch.stack([pixels(row["chosen"]) for row in rows])
    assert verifier.scores(photographs, *ids)["both_correct"].float().mean() > 0.9
    assert all(to_png(image)["bytes"] for image in photographs[:1])
    assert any(row["chosen"].tobytes() != row["rejected"].tobytes() for row in rows)


def pixels(image: Image.Image) -> torch.Tensor:
    levels = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32)
    return levels.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("arm", [arm for arms in BASELINES.arms.values() for arm in arms])
def test_every_arm_of_the_comparison_has_a_configuration_of_the_same_budget(arm, tmp_path):
    names = {default_name(arm), *BASELINES.tried(arm)}
    # The default is one of the values that are tried.
    assert default_name(arm) in BASELINES.tried(arm) or find_arm(arm).strength is None
    for name in names:
        config = make_config(find_arm(name), 3, BASELINES.settings, IMAGES, tmp_path)
        images = config.per_device_train_batch_size * {"pair": 2, "each": 1, "chosen": 1}[config.arms]
        assert images == BASELINES.settings.batch_size * (1 if config.arms == "chosen" else 2)
        assert (config.max_steps, config.learning_rate, config.seed) == (50, 1e-4, 3)
        if "@" in name:
            assert config.beta == float(name.partition("@")[2])


def test_a_strength_after_an_arm_takes_the_place_of_its_own():
    assert find_arm("dpo@200").overrides == {"beta": 200.0}
    assert find_arm("ipo@200").overrides == {"loss_type": "ipo", "beta": 200.0}
    assert find_arm("dpo_best@5").uses_best_beta is False
    assert find_arm("mapo@0.5").label == "MaPO, beta 0.5"
    assert all(find_arm(name) is arm for name, arm in ARMS.items())


@pytest.mark.parametrize(("name", "named"), [("ppo@2", "ppo"), ("sft@2", "no strength"), ("dpo@much", "much")])
def test_an_arm_that_cannot_be_is_refused(name, named):
    with pytest.raises(ConfigurationError, match=named):
        find_arm(name)


def test_methods_with_data_of_their_own_are_refused_elsewhere():
    with pytest.raises(ConfigurationError, match="--baselines"):
        Part("off_policy", ("dpo", "d3po"), (0,))
    assert Part("trajectories", ("d3po",), (0,)).runs == [("d3po", 0)]


def test_the_seed_of_the_sweep_is_not_reported():
    with pytest.raises(ConfigurationError, match="100"):
        replace(BASELINES, seeds=(0, 100))


def record(accuracy: float, distance: float) -> dict[str, float]:
    return {"accuracy": accuracy, "frechet_distance": distance}


def test_choosing_takes_the_least_distance_within_a_standard_error_of_the_highest_accuracy():
    # sqrt(0.9 * 0.1 / 100) is 0.03.
    records = {"a": record(0.9, 50.0), "b": record(0.88, 20.0), "c": record(0.86, 10.0)}
    assert choose(records, num_samples=100) == "b"
    assert choose(records, num_samples=50) == "c"
    assert choose(records, num_samples=10_000) == "a"


def row(label: str, accuracies: list[float], distances: list[float], **changes) -> dict:
    final = {"accuracy": spread(accuracies), "frechet_distance": spread(distances), "second_accuracy": spread([0.5])}
    sweep = {"1": {}, "2": {}, "3": {}}
    fields = {"is_default": True, "is_best": True, "num_collapsed": 0, "num_seeds": len(accuracies)}
    return {"label": label, "method": label, "strength": "2", "final": final, "sweep": sweep, **fields, **changes}


def test_the_sentences_claim_what_every_seed_shows():
    base = record(0.88, 21.0)
    rows = [
        row("A", [0.9, 0.95], [30.0, 40.0]),
        row("B", [0.89, 0.99], [10.0, 20.0]),
        row("C", [0.8, 0.9], [22.0, 5.0]),
    ]
    (sentence,) = against_base(rows, base, "accuracy", ("More accurate", "less accurate"))
    assert "(88%)" in sentence and sentence.endswith("seed: none; neither: C.") and "strength: A, B;" in sentence
    (sentence,) = against_base(rows, base, "frechet_distance", ("Closer", "farther"))
    assert "strength: B; farther with every seed: A; neither: C." in sentence
    accuracy, distance = leader(rows)
    assert "B (94%)" in accuracy and accuracy.endswith(": A, C.")
    assert "C (14)" in distance and distance.endswith(": B.")
    assert leader(rows[:1]) == []


def test_the_sentences_say_what_the_sweep_changed_and_where_it_ends():
    rows = [
        row("A", [0.5], [1.0], is_best=False),
        row("A", [0.9], [1.0], is_default=False, strength="3"),
        row("B", [0.9], [1.0]),
        row("SFT", [0.9], [1.0], sweep={}, strength=""),
    ]
    changed, ends = sweep_sentences(rows)
    assert "for 1 of 2 methods" in changed and changed.endswith("by it: A.")
    assert ends.endswith("beyond: A.")
    assert sweep_sentences(rows[3:]) == []


def test_the_sentences_name_collapses_and_what_the_second_verifier_does_not_see():
    assert collapses([row("A", [0.9], [1.0])]) == ["No run of the table collapsed."]
    (sentence,) = collapses([row("A", [0.9], [1.0]), row("B", [0.1, 0.9], [1.0, 1.0], num_collapsed=1)])
    assert sentence.endswith("B at 2 (1 of 2).")
    (sentence,) = collapses([row("SFT", [0.1], [1.0], num_collapsed=1, strength="")])
    assert sentence.endswith("SFT (1 of 1).")
    (sentence,) = verifier_gap([row("A", [0.4], [1.0]), row("B", [0.7], [1.0])])
    assert "the other: B." in sentence and "B, +20.0 points" in sentence


def test_a_markdown_table_has_a_rule_below_its_header():
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def options(*argv: str) -> argparse.Namespace:
    return make_parser().parse_args(["--baselines", *argv])


def test_options_narrow_the_comparison():
    comparison = comparison_from(options("--arms", "d3po", "sft", "--seeds", "4", "5", "--max-steps", "7"))
    assert comparison.arms == {"off_policy": ("sft",), "on_policy": ("sft",), "trajectories": ("d3po",)}
    assert comparison.seeds == (4, 5) and comparison.strengths == STRENGTHS
    assert comparison.settings == replace(BASELINES.settings, max_steps=7, eval_every=7)
    assert comparison_from(options()) == BASELINES


@pytest.mark.parametrize("argv", [("--video",), ("--quick",), ("--beta", "2"), ("--arms", "ppo")])
def test_options_that_do_not_fit_the_comparison_are_refused(argv):
    with pytest.raises(ConfigurationError, match=argv[-1] if argv[0] == "--arms" else argv[0]):
        comparison_from(options(*argv))


@pytest.mark.slow
def test_the_command_writes_the_report_and_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-m", "trl_sipo.cli.main", "demo", "--baselines", "--arms", "sft", "--seeds", "0"]
    command += ["--max-steps", "2", "--workers", "1", "--output", str(tmp_path)]
    for num_kept in (0, 2):
        process = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert process.returncode == 0, process.stderr[-3000:]
        assert "off-policy:" in process.stdout
        assert ("(2 runs were there already)" in process.stdout) == (num_kept == 2)
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [(row["source"], row["arm"], row["strength"]) for row in rows] == [
        ("off_policy", "sft", ""),
        ("on_policy", "sft", ""),
    ]
    assert not (tmp_path / "figures" / "sweep.png").exists() and (tmp_path / "report.html").is_file()
