# SPDX-License-Identifier: Apache-2.0
"""The paper's questions on real models: the real parser takes every run, and the page says what is in them."""

import json
import shlex
from pathlib import Path

import pytest

from trl_sipo.cost.devices import GPUS
from trl_sipo.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("sd15", "sdxl", "cogvideox", "wan", "flux")
REPORT = ROOT / "reports" / "paper" / "real_models"


@pytest.fixture(scope="module")
def real(paper):
    """The module."""
    return paper("real_models")


def test_models_name_what_there_is(real):
    models = real.read_models()
    assert tuple(models) == MODELS
    for model in models.values():
        assert (ROOT / model.config).is_file() and (ROOT / model.accelerate).is_file() and model.gpu in GPUS
        assert real.base_of(model.name).training.max_steps > 0


@pytest.mark.parametrize("question", ["beta_sensitivity", "label_noise", "on_off_policy", "static_dynamic_mask"])
def test_arms_are_real_settings(question, real):
    """By the trainer's own parser; what an arm names is what the run then has."""
    model = real.read_models()["sd15"]
    for run in real.runs_of(model, question, seeds=1):
        training = real.parse(model, run.settings).training
        for name, value in run.settings.items():
            assert getattr(training, name) == value


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_arm_of_every_model_is_one(name, real):
    model = real.read_models()[name]
    for question in real.read_questions():
        for run in real.runs_of(model, question, seeds=1):
            training = real.parse(model, run.settings).training
            assert all(getattr(training, setting) == value for setting, value in run.settings.items())


def test_every_question_asks_and_tells_its_arms_apart(real):
    for name, entry in real.read_questions().items():
        assert entry.keys() == {"asks", "paper", "arms"} and entry["asks"].endswith("?"), name
        arms = [json.dumps(arm, sort_keys=True) for arm in entry["arms"].values()]
        assert len(set(arms)) == len(arms) > 1, name
        allowed = {"settings", "times", "data"}
        assert all(arm.keys() <= allowed for arm in entry["arms"].values()), name


def test_an_unknown_setting_is_an_error(real):
    with pytest.raises(ConfigurationError, match="clip_rnage"):
        real.parse(real.read_models()["sd15"], {"clip_rnage": 0.1})


def test_commands_are_those_of_the_sweep(real, capsys):
    real.main(["--model", "wan", "--question", "beta_sensitivity", "--seeds", "1", "--dataset_name", "my cache"])
    commands = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert (
        len(commands) == 8
        and len({shlex.split(line)[shlex.split(line).index("--output_dir") + 1] for line in commands}) == 8
    )
    words = shlex.split(commands[0])
    assert words[words.index("--dataset_name") + 1] == "my cache"
    assert words[words.index("--beta") + 1] == "0.4"  # two hundredths of the file's 20
    assert words[words.index("--mixed_precision") + 1] == "fp16" and words[words.index("--num_machines") + 1] == "2"
    assert words[words.index("--per_device_train_batch_size") + 1] == "2"
    with pytest.raises(ConfigurationError, match="--seeds"):
        real.main(["--model", "wan", "--seeds", "0"])


def test_data_beside_the_given_ones_have_its_name(real):
    runs = real.runs_of(real.read_models()["sd15"], "on_off_policy", seeds=1)
    assert [run.data for run in runs] == ["", "", "own", "own"]
    assert "--dataset_name cache-own " in real.command_of(runs[-1], "cache")


def test_the_page_is_that_of_the_numbers(real):
    measured = json.loads(REPORT.with_suffix(".json").read_text(encoding="utf-8"))
    assert tuple(measured) == MODELS
    assert REPORT.with_suffix(".md").read_text(encoding="utf-8") == real.page(measured)
    for name, entry in measured.items():
        assert entry["peak_bytes"] < entry["room_bytes"], name
        assert 0 < entry["step_seconds"]["low"] < entry["step_seconds"]["high"], name


@pytest.mark.slow
def test_the_numbers_are_those_of_the_models(real):
    """Of the fastest one, counted again."""
    measured = json.loads(REPORT.with_suffix(".json").read_text(encoding="utf-8"))
    again = real.measure_model(real.read_models()["sd15"])
    for name in ("parameters", "trained", "pairs_per_step", "peak_bytes", "flops_per_call"):
        assert again[name] == measured["sd15"][name], name
    assert again["step_seconds"] == pytest.approx(measured["sd15"]["step_seconds"])
