# SPDX-License-Identifier: Apache-2.0
"""Settings of rounds: what is read, what overrides it, and what is refused before anything starts."""

import pytest

from tests.online.conftest import tiny_settings
from trl_sipo.errors import ConfigurationError
from trl_sipo.online.config import config_differences, make_config, read_settings, with_overrides


def make(material, *words, **settings):
    return make_config(with_overrides(tiny_settings(material, "runs", **settings), words))


def test_a_file_is_read_with_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "online.yaml"
    path.write_text("rounds: 3\ntraining:\n  learning_rate: 5e-5\n  beta: 2\nrewards: [a, b]\noutput: 1.2.3\n")
    settings = read_settings(path)
    assert settings["training"] == {"learning_rate": 5e-5, "beta": 2} and settings["output"] == "1.2.3"
    assert settings["rounds"] == 3 and settings["rewards"] == ["a", "b"]


@pytest.mark.parametrize("content", ["rounds: [3", "- a\n- b\n", None])
def test_a_file_that_is_none_is_one_line(tmp_path, content):
    path = tmp_path / "online.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match="online.yaml"):
        read_settings(path)


def test_the_command_line_wins_over_the_file(material):
    words = ["--rounds=7", "--training.beta", "3e2", "--evaluation.prompts", "x.txt", "--reference", "refreshed"]
    config = make(material, *words, "--rewards", "pickscore", "hpsv2")
    assert config.rounds == 7 and config.training["beta"] == 300.0 and config.training["max_steps"] == 2
    assert config.evaluation.prompts == "x.txt" and config.reference == "refreshed"
    assert config.rewards == ["pickscore", "hpsv2"]
    assert make(material, "--rewards", "pickscore").rewards == ["pickscore"]


def test_defaults_are_those_of_the_protocol(material):
    settings = tiny_settings(material, "runs")
    del settings["sampling"]
    config = make_config(settings)
    assert config.sampling.samples_per_prompt == 2 and config.reference == "fixed" and config.replay == 0.0
    assert config.feedback.sft_per_prompt == 0
    own_play = {"mode": "self_play", "real_data": "photographs"}
    assert make_config({**settings, **own_play}).reference == "refreshed"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--round", "3"], "Unknown setting `round`; known are .*rounds"),
        (["--training.bets", "3"], "Unknown setting `training.bets`; known are .*beta"),
        (["--sampling.seed", "3"], "Unknown setting `sampling.seed`"),
        (["--feedback.margin", "3"], "Unknown setting `feedback.margin`; known are .*min_margin"),
        (["--training.seed", "3"], "`training.seed` is decided by the rounds"),
        (["--training.beta", "-1"], "beta=-1 must be positive"),
        (["--rounds", "0"], "`rounds` must be at least 1"),
        (["--rounds", "many"], "`rounds` must be a whole number"),
        (["--training.max_steps", "many"], "`training.max_steps` must be a whole number, got 'many'"),
        (["--training.per_device_train_batch_size", "2.5"], "`training.per_device_train_batch_size` must be a whole"),
        (["--training.use_cpu", "maybe"], "`training.use_cpu` must be true or false"),
        (["--rounds"], "`--rounds` needs a value"),
        (["3"], "'3' belongs to no option"),
        (["--replay", "1"], "`replay=1`"),
        (["--reference", "moving"], "`reference` must be one of fixed, refreshed"),
        (["--mode", "spin"], "`mode` must be one of reward, self_play"),
        (["--mode", "self_play"], "needs `real_data`"),
        (["--real_data", "photographs"], "`real_data` is of `mode: self_play` only"),
        (["--method", "ppo"], "Unknown method 'ppo'"),
        (["--method", "kto"], "learns from single images"),
        (["--method", "d3po"], "reads recorded trajectories"),
        (["--method", "mapo", "--reference", "refreshed"], "`method: mapo` has no reference"),
        (["--sampling.samples_per_prompt", "1"], "must be at least 2"),
        (["--sampling", "3"], "`sampling` must be settings by name"),
        (["--rounds.number", "3"], "`rounds` is 2, which has no parts"),
        (["--feedback.held_out_share", "0.1"], "`feedback.held_out_share` has no use"),
        (["--feedback.sft_per_prompt", "1"], "`feedback.sft_per_prompt` has no use"),
        (["--evaluation.max_prompts", "3"], "`evaluation.prompts` is missing"),
        (["--evaluation.prompts", "x", "--evaluation.level", "1"], "0 < level < 1"),
        (["--reward_options", "{clipscore: {}}"], "`reward_options` are given for clipscore"),
        (["--feedback.min_margin", "wide"], "not supported between"),
        (["--sampling.guidance_scale", "wide"], "`sampling`: .* not supported between"),
        (["--rewards", "[a"], "`--rewards .a` is not valid YAML"),
        (["--dtype", "float8"], "`dtype` must be one of"),
    ],
)
def test_mistakes_are_named(material, words, message):
    with pytest.raises(ConfigurationError, match=message):
        make(material, *words)


def test_what_is_missing_is_named(material):
    settings = tiny_settings(material, "runs")
    del settings["prompts"]
    with pytest.raises(ConfigurationError, match="`prompts` is missing"):
        make_config(settings)
    with pytest.raises(ConfigurationError, match="names nothing to rank by"):
        make_config({**tiny_settings(material, "runs"), "rewards": []})


def test_differences_are_named_by_their_place(material):
    one, other = (make(material, *words).record() for words in ([], ["--training.beta", "7", "--seed", "3"]))
    assert config_differences(one, one) == []
    assert config_differences(one, other) == ["training.beta: 50.0 there, 7 now", "seed: 0 there, 3 now"]
    assert make(material, "--rounds", "9").record() == one
