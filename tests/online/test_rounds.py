# SPDX-License-Identifier: Apache-2.0
"""Rounds on a tiny model: what they leave behind, how they go on, and what reference, replay and self-play do."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.online.conftest import BRIGHTNESS
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import picture, predict
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.errors import BackboneError, ConfigurationError, DatasetError
from trl_sipo.generation.models import apply_lora
from trl_sipo.online.pairs import RealImages, training_rows
from trl_sipo.online.rounds import _prepare, round_folder, run_rounds
from trl_sipo.online.training import _make_trainer

LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def finished(tiny_config, material, tmp_path_factory):
    """A finished run with an evaluation and replay, and its summary."""
    evaluation = {"prompts": str(material / "others.txt"), "rewards": [BRIGHTNESS], "samples_per_prompt": 2}
    config = tiny_config(tmp_path_factory.mktemp("online") / "run", evaluation=evaluation, replay=0.5)
    return config, run_rounds(config)


def weights_of(config, number):
    return load_file(round_folder(config, number) / "model" / LORA_FILE)


def is_same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_round_leaves_its_prompts_samples_scores_pairs_and_policy(finished):
    config, summary = finished
    prompts = set()
    for number in range(2):
        folder = round_folder(config, number)
        prompts = {json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()}
        assert prompts == {"a cat", "a dog", "a boat"}
        assert len(list((folder / "samples").rglob("*.png"))) == 6
        assert pq.read_table(folder / "scores.parquet").num_rows == 6
        pairs = pq.read_table(folder / "pairs.parquet")
        assert pairs.num_rows == summary["rounds"][number]["pairs"] == 3
        assert set(pairs["source"].to_pylist()) == {"policy-1" if number else "base"}
        assert (folder / "model" / LORA_FILE).is_file() and (folder / "run" / "checkpoint-2").is_dir()
        assert json.loads((folder / "round.json").read_text()) == summary["rounds"][number]
    assert not is_same(weights_of(config, 0), weights_of(config, 1))
    assert [part["replayed"] for part in summary["rounds"]] == [0, 3]
    assert [part["training_pairs"] for part in summary["rounds"]] == [3, 6]


def test_noise_is_new_in_each_round_and_the_policy_moves(finished):
    config, _ = finished
    first, second = (
        sorted(path.read_bytes() for path in (round_folder(config, number) / "samples").rglob("*.png"))
        for number in range(2)
    )
    assert not set(first) & set(second)
    settings = [json.loads((round_folder(config, n) / "samples/settings.json").read_text()) for n in range(2)]
    assert settings[0]["settings"]["seed"] != settings[1]["settings"]["seed"]


def test_the_evaluation_compares_each_policy_with_the_base_on_one_noise(finished):
    config, summary = finished
    for part in summary["rounds"]:
        rows = {(row["model"], row["metric"]): row for row in part["evaluation"]["metrics"]}
        assert set(rows) == {(model, name) for model in ("base", "policy") for name in ("redness", "brightness")}
        against = rows["policy", "redness"]["against_base"]
        assert against["num_samples"] == 4 and against["num_prompts"] == 2
        assert part["evaluation"]["variety"]["drift"]["estimate"] > 0
    base, policy = (
        json.loads((folder / "settings.json").read_text())["settings"]
        for folder in (
            round_folder(config, 0).parent / "evaluation" / "base",
            round_folder(config, 1) / "evaluation",
        )
    )
    assert base == policy


def test_importance_weights_are_a_matrix_of_policies_and_rounds(finished):
    _, summary = finished
    known = {(entry["policy"], entry["data"]): entry for entry in summary["weights"]}
    assert list(known) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    for entry in known.values():
        assert entry["pairs"] == 2 and len(entry["mean_by_time"]) == len(entry["times"]) == 2
        assert 0 < entry["mean"] <= 1 and 0 <= entry["masked_share"] <= 1 and 0 < entry["effective_share"] <= 1
        assert entry["mean"] == pytest.approx(sum(entry["mean_by_time"]) / 2)
    assert known[1, 0]["mean"] != known[0, 0]["mean"]


def test_a_finished_run_does_nothing_again_and_more_rounds_go_on(finished, tmp_path):
    config, summary = finished
    copy = replace(config, output=str(tmp_path / "run"))
    shutil.copytree(config.output, copy.output)
    before = {path: path.stat().st_mtime_ns for path in round_folder(copy, 0).rglob("*")}
    assert run_rounds(copy) == summary
    more = run_rounds(replace(copy, rounds=3))
    assert more["rounds"][:2] == summary["rounds"] and more["rounds"][2]["replayed"] == 3
    assert {path: path.stat().st_mtime_ns for path in round_folder(copy, 0).rglob("*")} == before


@pytest.mark.parametrize("lost", ["the end of training", "half of the data"])
def test_a_round_goes_on_inside_and_ends_as_if_never_stopped(finished, tmp_path, lost):
    config, summary = finished
    copy = replace(config, output=str(tmp_path / "run"))
    shutil.copytree(config.output, copy.output)
    folder = round_folder(copy, 1)
    for name in ("round.json", "training.json"):
        (folder / name).unlink()
    for name in ("model", "evaluation"):
        shutil.rmtree(folder / name)
    if lost == "half of the data":
        (folder / "data.json").unlink()
        (folder / "pairs.parquet").unlink()
        shutil.rmtree(folder / "run")
        for path in sorted((folder / "samples").rglob("*.png"))[::2]:
            path.unlink()
    again = run_rounds(copy)
    assert is_same(weights_of(copy, 1), weights_of(config, 1))
    for file in ("pairs.parquet", "scores.parquet"):
        assert (folder / file).read_bytes() == (round_folder(config, 1) / file).read_bytes()
    assert again["weights"] == summary["weights"]
    assert again["rounds"][1]["evaluation"] == summary["rounds"][1]["evaluation"]


def test_other_settings_in_the_same_folder_are_refused(finished):
    config, _ = finished
    with pytest.raises(ConfigurationError, match=r"training.beta: 50.0 there, 51.0 now"):
        run_rounds(replace(config, training={**config.training, "beta": 51.0}))


def test_settings_can_be_mended_after_a_run_that_ended_before_its_first_sample(tiny_config, tmp_path):
    """The folder is not that of the wrong settings for ever, and no round has begun with them."""
    with pytest.raises(BackboneError, match="nowhere"):
        run_rounds(tiny_config(tmp_path, model=str(tmp_path / "nowhere")))
    sampling = {"num_inference_steps": 1, "samples_per_prompt": 2, "height": 33, "width": 32}
    with pytest.raises(ConfigurationError, match="height 33"):
        run_rounds(tiny_config(tmp_path, sampling=sampling))
    assert len(run_rounds(tiny_config(tmp_path, rounds=1))["rounds"]) == 1


def test_a_lora_that_finds_no_place_is_refused_before_samples_are_drawn(tiny_config, tmp_path):
    with pytest.raises(ConfigurationError, match=r"no LoRA with `target_modules` \['nowhere'\].*Those of"):
        run_rounds(tiny_config(tmp_path, lora={"r": 2, "target_modules": ["nowhere"]}))
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("lora", [{"r": "abc"}, {"r": -1}, {"r": 2, "lora_alpha": "x"}])
def test_sizes_of_a_lora_are_checked_before_samples_are_drawn(tiny_config, tmp_path, lora):
    with pytest.raises(ConfigurationError, match="must be a positive number"):
        run_rounds(tiny_config(tmp_path, lora=lora))
    assert not any(tmp_path.glob("round-*"))


def test_evaluation_prompts_that_are_trained_on_are_warned_of(tiny_config, material, tmp_path, caplog):
    (tmp_path / "mixed.txt").write_text("a cat\na house\n")
    config = tiny_config(tmp_path / "run", evaluation={"prompts": str(tmp_path / "mixed.txt")})
    with ExitStack() as stack:
        _prepare(config, stack)
    assert "1 of 2 evaluation prompts are trained on too, such as 'a cat'" in caplog.text


# ------------------------------------------------------------------------------------------------------- references


@pytest.fixture(scope="module", params=[True, False], ids=["lora", "full"])
def first_round(request, tiny_config, tmp_path_factory):
    """A run of one round, whose reference does not matter: the policy starts at the base."""
    options = {} if request.param else {"lora": None}
    config = tiny_config(tmp_path_factory.mktemp("first") / "run", rounds=1, **options)
    run_rounds(config)
    return config


@pytest.mark.parametrize("reference", ["fixed", "refreshed"])
def test_the_reference_is_the_base_or_the_policy_at_the_start(first_round, tmp_path, reference):
    """What the second round's trainer is compared with says what the base says, or what the first round saved."""
    config, saved = replace(first_round, reference=reference), round_folder(first_round, 0) / "model"
    rows = load_preference_dataset(str(round_folder(config, 0) / "pairs.parquet"))
    trainer = _make_trainer(config, 1, rows, saved, tmp_path / "next")
    base, policy = tiny_stable_diffusion(), tiny_stable_diffusion()
    if config.lora is not None:
        apply_lora(policy, saved)
        assert set(trainer.model.peft_config) == ({"default"} if reference == "fixed" else {"default", "ref"})
    else:
        policy = type(policy).from_pretrained(saved)
    torch.testing.assert_close(predict(trainer.adapter.pipeline), predict(policy), rtol=1e-5, atol=1e-6)
    expected = base if reference == "fixed" else policy
    torch.testing.assert_close(reference_prediction(trainer), predict(expected), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(predict(base), predict(policy), atol=1e-4)
    trainer.train()
    assert trainer.state.global_step == 2


def reference_prediction(trainer):
    """What the reference says of the inputs of `predict`."""
    pipeline = trainer.adapter.pipeline
    with trainer.reference.active(trainer.model, trainer.unwrapped_model) as denoiser:
        own, pipeline.unet = pipeline.unet, denoiser
        try:
            return predict(pipeline)
        finally:
            pipeline.unet = own


# --------------------------------------------------------------------------------------------- replay and self-play


def _write_pairs(folder, prompts):
    """Pairs of one round, whose prompts tell of which."""
    folder.mkdir(parents=True)
    columns = {name: [picture(seed) for seed in range(len(prompts))] for name in ("chosen", "rejected")}
    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    rows = datasets.Dataset.from_dict({"prompt": prompts, **columns}, features=datasets.Features(features))
    rows.to_parquet(folder / "pairs.parquet")


@pytest.mark.parametrize("replay, expected", [(0.0, 0), (0.25, 2), (0.5, 6), (0.9, 10)])
def test_replay_is_a_share_of_the_whole_and_no_more_than_there_is(tiny_config, tmp_path, replay, expected):
    config = tiny_config(tmp_path / "run", replay=replay)
    folders = [round_folder(config, number) for number in range(3)]
    for number, count in enumerate((4, 6, 6)):
        _write_pairs(folders[number], [f"round {number}, {place}" for place in range(count)])
    rows, replayed = training_rows(config, 2, folders)
    prompts = rows["prompt"]
    assert replayed == expected and len(rows) == 6 + expected
    assert prompts[:6] == [f"round 2, {place}" for place in range(6)]
    assert len(set(prompts)) == len(prompts) and not any(prompt.startswith("round 2") for prompt in prompts[6:])
    if expected > 5:
        assert {prompt[:7] for prompt in prompts[6:]} == {"round 0", "round 1"}
    assert training_rows(config, 2, folders)[0]["prompt"] == prompts
    assert training_rows(config, 0, folders)[1] == 0


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two pictures of a cat, one of a dog, one of a boat, as Parquet."""
    path = tmp_path_factory.mktemp("real") / "photographs.parquet"
    columns = {"prompt": ["a cat", "a dog ", "a cat", "a boat"], "image": [picture(seed) for seed in range(4)]}
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def test_self_play_prefers_real_images_to_samples_of_the_previous_policy(tiny_config, photographs, tmp_path):
    options = {"mode": "self_play", "real_data": str(photographs), "prompts": f"dataset:{photographs}", "rewards": []}
    config = tiny_config(tmp_path / "run", **options)
    summary = run_rounds(config)
    assert config.reference == "refreshed"
    prompts = pq.read_table(photographs)["prompt"].to_pylist()
    real = {(prompt.strip(), picture(seed).tobytes()) for seed, prompt in enumerate(prompts)}
    for number in range(2):
        folder = round_folder(config, number)
        rows = load_preference_dataset(str(folder / "pairs.parquet"))
        assert len(rows) == summary["rounds"][number]["pairs"] == 6
        for row in rows:
            assert (row["prompt"], row["chosen"].tobytes()) in real
        stored = {row["rejected"]["bytes"] for row in pq.read_table(folder / "pairs.parquet").to_pylist()}
        assert stored == {path.read_bytes() for path in (folder / "samples").rglob("*.png")}
    assert not (round_folder(config, 0) / "scores.parquet").exists()


def test_self_play_needs_an_image_for_every_prompt(tiny_config, photographs, tmp_path, material):
    config = tiny_config(
        tmp_path / "run",
        mode="self_play",
        real_data=str(photographs),
        prompts=str(material / "others.txt"),
        rewards=[],
    )
    with pytest.raises(DatasetError, match="2 of 2 prompts have no image"):
        run_rounds(config)
    assert not (tmp_path / "run").exists()


def test_self_play_chooses_among_all_images_of_a_prompt(tiny_config, photographs):
    real = RealImages(str(photographs), "train")
    assert {real.stored("a cat", seed)["bytes"] for seed in range(4)} == {
        real.stored("a cat", s)["bytes"] for s in (0, 1)
    }
    assert real.stored("a cat", 0)["bytes"] != real.stored("a cat", 1)["bytes"]
