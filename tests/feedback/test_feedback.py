# SPDX-License-Identifier: Apache-2.0
"""From what a model drew to pairs that train: real samples, real Parquet, a real trainer."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from tests.feedback.rewards import brightness, redness
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import SIPO, make_trainer
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.feedback.feedback import FeedbackSettings, is_held_out, write_feedback
from trl_sipo.generation.prompt_sets import PromptRecord
from trl_sipo.generation.sampling import SamplingSettings, draw_samples
from trl_sipo.generation.scoring import score_samples

PROMPTS = [PromptRecord(f"p{number}", text, "animals") for number, text in enumerate(("a cat", "a dog", "a boat"))]
SETTINGS = SamplingSettings(num_inference_steps=1, samples_per_prompt=3, height=32, width=32)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples") / "tiny"
    draw_samples(tiny_stable_diffusion(), PROMPTS, folder, SETTINGS, batch_size=3, show_progress=False)
    return score_samples(folder, [redness(), brightness()], batch_size=2, show_progress=False)


def test_scores_are_those_of_the_files(scored):
    red = redness()
    for sample, value in zip(scored.samples, scored.scores["redness"], strict=True):
        assert red.score([sample.open()], [""]).item() == pytest.approx(value)
    table = scored.table()
    assert table.column_names == ["prompt_id", "index", "prompt", "category", "redness", "brightness"]
    assert table.num_rows == 9 and table["index"].to_pylist() == [0, 1, 2] * 3


def test_rewards_of_one_name_and_of_other_media_are_refused(scored, tmp_path):
    folder = scored.samples[0].path.parents[1]
    with pytest.raises(ConfigurationError, match="Two rewards are called 'redness'"):
        score_samples(folder, [redness(), redness()])
    named = redness()
    named.info = type(named.info)("prompt_id", "none", "none")
    with pytest.raises(ConfigurationError, match="A reward is called 'prompt_id', as a column of the table"):
        score_samples(folder, [named])
    video = redness()
    video.info = type(video.info)("motion", "none", "none", media=frozenset({"video"}))
    with pytest.raises(ConfigurationError, match="scores videos, and the samples are images"):
        score_samples(folder, [video])


def test_pairs_hold_the_best_and_worst_files_byte_for_byte(scored, tmp_path):
    report = write_feedback(scored, tmp_path, FeedbackSettings(weights={"redness": 1e9}), source="tiny")
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert report["pairs"] == len(rows) == 3 and report["held_out_pairs"] == 0
    for number, row in enumerate(rows):
        indices = range(3 * number, 3 * number + 3)
        best = max(indices, key=lambda index: scored.scores["redness"][index])
        worst = min(indices, key=lambda index: scored.scores["redness"][index])
        assert row["chosen"]["bytes"] == scored.samples[best].path.read_bytes()
        assert row["rejected"]["bytes"] == scored.samples[worst].path.read_bytes()
        assert row["prompt"] == PROMPTS[number].prompt and row["category"] == "animals" and row["source"] == "tiny"
        assert row["pair_id"] == f"p{number}-{best % 3:03d}-{worst % 3:03d}" and row["margin"] > 0


def test_pairs_go_straight_into_a_trainer(scored, tmp_path):
    write_feedback(scored, tmp_path, FeedbackSettings(selection="all"), source="tiny")
    pairs = load_preference_dataset(str(tmp_path / "pairs.parquet"))
    assert len(pairs) == 9  # three of three samples, three prompts
    trainer = make_trainer(SIPO, tmp_path / "run", pairs=pairs, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_best_samples_become_a_dataset_of_images(scored, tmp_path):
    settings = FeedbackSettings(sft_per_prompt=2, sft_quantile=0.0, weights={"redness": 1e9})
    assert write_feedback(scored, tmp_path, settings, source="tiny")["sft"] == 6
    rows = load_dataset("parquet", data_files=str(tmp_path / "sft.parquet"), split="train", cache_dir=str(tmp_path))
    assert rows.column_names == ["prompt", "image", "redness", "brightness"] and rows[0]["image"].size == (32, 32)
    assert rows[0]["redness"] == scored.scores["redness"][:3].max()


def test_held_out_prompts_are_in_no_training_file(scored, tmp_path):
    share = 0.5
    held = {record.prompt for record in PROMPTS if is_held_out(record.prompt_id, share)}
    assert 0 < len(held) < 3, "the ids of this test must fall on both sides"
    report = write_feedback(scored, tmp_path, FeedbackSettings(held_out_share=share), source="tiny")
    prompts = {
        name: set(pq.read_table(tmp_path / f"{name}.parquet")["prompt"].to_pylist())
        for name in ("pairs", "held_out", "sft")
    }
    assert prompts["held_out"] == held and not held & (prompts["pairs"] | prompts["sft"])
    assert report["pairs"] + report["held_out_pairs"] == 3
    write_feedback(scored, tmp_path, FeedbackSettings(sft_per_prompt=0), source="tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["feedback.json", "pairs.parquet"]
    assert np.mean([is_held_out(f"prompt-{number}", 0.2) for number in range(4000)]) == pytest.approx(0.2, abs=0.02)


def test_the_report_says_how_rewards_contradict_one_another(scored, tmp_path):
    write_feedback(scored, tmp_path, FeedbackSettings(), source="tiny")
    report = json.loads((tmp_path / "feedback.json").read_text())
    [conflict] = report["conflicts"]
    assert conflict["num_pairs"] == 9 and 0 <= conflict["conflict_rate"] <= 1
    assert report["all_agree"] == pytest.approx(1 - conflict["conflict_rate"])
    assert report["rewards"]["brightness"]["higher_is_better"] is False


def test_no_pair_left_for_training_is_an_error_too(scored, tmp_path):
    with pytest.raises(DatasetError, match="All 3 pairs are held out"):
        write_feedback(scored, tmp_path, FeedbackSettings(held_out_share=0.999999), source="tiny")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_no_report_of_other_pairs(scored, tmp_path, monkeypatch):
    write_feedback(scored, tmp_path, FeedbackSettings(), source="tiny")
    monkeypatch.setattr("trl_sipo.feedback.feedback._ROWS_AT_A_TIME", 0)  # an error in the middle of writing
    with pytest.raises(ValueError):
        write_feedback(scored, tmp_path, FeedbackSettings(selection="all"), source="tiny")
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.parquet"))


def test_no_pair_left_is_an_error_with_the_way_out(scored, tmp_path):
    with pytest.raises(DatasetError, match="smaller margin"):
        write_feedback(scored, tmp_path, FeedbackSettings(min_margin=99.0), source="tiny")
    assert not list(tmp_path.iterdir())
