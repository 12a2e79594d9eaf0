# SPDX-License-Identifier: Apache-2.0
"""Single pictures beside the sample grids, and the rewards that score them while a run goes on."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.trainer.run_logs import SAMPLING, rows
from tests.trainer.runs import DPO, SIPO, make_config, make_trainer
from trl_sipo.errors import ConfigurationError
from trl_sipo.rewards.programmatic import Brightness


def test_single_pictures_lie_beside_the_grid(tmp_path):
    trainer = make_trainer(DPO, tmp_path, max_steps=2, learning_rate=1e-1, sample_seed=3, **SAMPLING)
    trainer.train()
    folder = tmp_path / "samples"
    grid = np.asarray(Image.open(folder / "step-000002.png"))
    for column, name in enumerate(("base", "step-000002")):
        for row in range(2):
            picture = np.asarray(Image.open(folder / name / f"{row:02d}.png"))
            assert np.array_equal(picture, grid[36 * row :, 36 * column :][:32, :32])
    assert json.loads((folder / "samples.json").read_text()) == {
        "prompts": ["a red cat", "a boat"], "seed": 3, "num_inference_steps": 1, "guidance_scale": None,
        "size": [32, 32], "num_frames": 1, "frame_rate": None,
    }  # fmt: skip


def test_rewards_of_the_samples_are_logged_beside_the_steps(tmp_path):
    """In rows of their own, which take nothing from the rows of the steps."""
    options = {"max_steps": 4, "logging_steps": 3, "learning_rate": 1e-1}
    make_trainer(SIPO, tmp_path / "plain", **options).train()
    trainer = make_trainer(SIPO, tmp_path / "run", **options, **SAMPLING, sample_rewards=["brightness", "sharpness"])
    trainer.train()

    found = rows(tmp_path / "run")
    scored = [row for row in found if "samples/brightness" in row]
    assert [row for row in found if row not in scored] == rows(tmp_path / "plain")
    assert [row["step"] for row in scored] == [2, 4]
    for row in scored:
        keys = {f"samples/{name}{of}" for name in ("brightness", "sharpness") for of in ("", "_base")}
        assert row.keys() == keys | {"step", "epoch"}
        for name, folder in (("", f"step-{row['step']:06d}"), ("_base", "base")):
            pictures = [Image.open(path) for path in sorted((tmp_path / "run/samples" / folder).iterdir())]
            mean = float(Brightness().score(pictures, SAMPLING["sample_prompts"]).mean())
            assert row[f"samples/brightness{name}"] == pytest.approx(mean)
    assert scored[1]["samples/sharpness"] != scored[1]["samples/sharpness_base"]


def test_a_scorer_that_fails_in_the_middle_leaves_a_gap(tmp_path, caplog):
    options = {"sample_rewards": "tests.trainer.run_logs:TiresAfterTwo", "max_steps": 8, "logging_steps": 8}
    make_trainer(DPO, tmp_path, **options, **SAMPLING).train()
    assert [row["step"] for row in rows(tmp_path) if "samples/tires" in row] == [2]
    for step, reason in ((4, "It is tired."), (6, "This picture shows nothing."), (8, "tires gave nan")):
        assert f"Step {step}: the samples could not be scored, and training goes on. {reason}" in caplog.text
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [8]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["brihgtness"], "There is no reward 'brihgtness'"),
        (["motion"], "'motion', which scores video, but the samples are of the kind 'image'"),
        (["brightness", "brightness"], "two rewards of the name 'brightness'"),
        (["tests.trainer.run_logs:lines"], "tests.trainer.run_logs:lines"),
    ],
)
def test_rewards_that_cannot_score_the_samples_are_refused_before_anything_is_loaded(names, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(DPO, tmp_path, model=str(tmp_path / "no model"), sample_rewards=names, **SAMPLING)


def test_rewards_without_samples_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="score the pictures of sample grids, and none are drawn"):
        make_config(DPO, tmp_path, sample_rewards="brightness")
    with pytest.raises(ConfigurationError, match="`sample_rewards` must be one or several texts"):
        make_config(DPO, tmp_path, sample_rewards=[3], **SAMPLING)


def test_prompts_that_a_reward_cannot_score_end_the_run_before_its_first_step(tmp_path):
    options = {**SAMPLING, "sample_prompts": ["a boat"], "sample_rewards": "colour_share"}
    trainer = make_trainer(DPO, tmp_path, **options)
    with pytest.raises(ValueError, match="names none of"):
        trainer.train()
    assert trainer.state.global_step == 0
