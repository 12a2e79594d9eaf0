# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo online` from a YAML file to its report, stopped and continued; and the pipeline on the demo's model."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.online.conftest import BRIGHTNESS, material, tiny_settings
from tests.trainer.children import end, fork, wait
from trl_sipo.cli.main import main
from trl_sipo.errors import Preempted, RoundsPreempted
from trl_sipo.online.config import make_config, read_settings
from trl_sipo.online.stopping import leaving_on_sigterm

__all__ = ["material"]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def config_file(material, tmp_path_factory):
    """The settings of a tiny run as a file, but for its folder."""
    path = tmp_path_factory.mktemp("config") / "online.yaml"
    evaluation = {"prompts": str(material / "others.txt"), "rewards": [BRIGHTNESS], "samples_per_prompt": 2}
    path.write_text(yaml.safe_dump(tiny_settings(material, "", evaluation=evaluation)))
    return path


def test_rounds_run_and_are_reported(config_file, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["online", "--config", str(config_file), "--output", str(output), "--training.max_steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "Round 0: 3 pairs of 6 samples (redness" in said and "Round 1: 3 pairs" in said
    report = json.loads((output / "online.json").read_text())
    assert report["config"]["training"]["max_steps"] == 1 and len(report["rounds"]) == 2
    assert report["command"].startswith("trl-sipo online --config")
    text, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    for words in ("Evaluation", "Mean importance weight", "Effective sample size", "Masked share", "brightness"):
        assert words in text and words in page
    assert page.count("data:image/png") == 2 and (output / "weights.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "words, message",
    [
        (["--training.bets", "3"], "Unknown setting `training.bets`"),
        (["--rewards", "pickscores"], "There is no reward 'pickscores'"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--feedback.combine", "sum"], "pareto"),
        (["--lora.rank", "3"], "peft.LoraConfig"),
        (["--config"], None),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(config_file, tmp_path, capsys, words, message):
    if message is None:
        assert main(["online"]) == 2
        assert "There are no settings" in capsys.readouterr().err
        return
    output = tmp_path / "run"
    assert main(["online", "--config", str(config_file), "--output", str(output), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (output / "config.json").exists()


def test_sigterm_between_training_runs_leaves_with_the_status_of_a_preemption(tmp_path):
    with pytest.raises(RoundsPreempted, match="the same command continues") as stop, leaving_on_sigterm(str(tmp_path)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.value.code == Preempted.STATUS and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "configs").glob("online_*.yaml")), ids=lambda path: path.stem
)
def test_the_configurations_are_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = read_settings(path)
    settings["training"] = {**settings["training"], "use_cpu": True, "bf16": False, "fp16": False}
    config = make_config(settings)
    assert config.rounds >= 5 and config.evaluation is not None
    assert set(config.evaluation.rewards) - set(config.rewards), "one that ranks nothing must look"


# ------------------------------------------------------------------------------------------------------------- slow


def _files(output):
    return [path for path in output.rglob("*") if path.is_file() and "cache" not in path.name]


def _results(output):
    """What a run is about: its data to the byte, and its policies to the bit."""
    kept = [path for path in _files(output) if path.suffix == ".parquet" or path.parent.name == "model"]
    found = {str(path.relative_to(output)): path.read_bytes() for path in kept if path.suffix == ".parquet"}
    for path in kept:
        if path.suffix == ".safetensors":  # the order of the metadata in its head is left to chance
            tensors = {name: value.numpy().tobytes() for name, value in load_file(path).items()}
            found[str(path.relative_to(output))] = tensors
    return found


def _go_on(config_file, output, signal_number, num_files):
    """Start the run in a process, stop it when it has written so many files more; returns its exit code."""
    words = ["online", "--config", str(config_file), "--output", str(output)]
    log, wanted = output.with_suffix(".log"), len(_files(output)) + num_files
    child = fork(lambda: sys.exit(main(words)), log)
    while signal_number is not None and len(_files(output)) < wanted:
        if (code := wait(child, 0.01)) is not None:
            return code
    if signal_number is not None:
        os.kill(child, signal_number)
    return end(child, log)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_as_one_that_was_left_alone(config_file, tmp_path):
    """A real process, stopped after any of its files by SIGKILL, SIGTERM and Ctrl-C, and started again."""
    alone, stopped, chance = tmp_path / "alone", tmp_path / "stopped", random.Random(0)
    assert _go_on(config_file, alone, None, 0) == 0
    signals, codes = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT), []
    while not codes or codes[-1] != 0:
        sent = signals[len(codes) % 3] if len(codes) < 12 else None
        codes.append(_go_on(config_file, stopped, sent, chance.randint(1, 12)))
        assert codes[-1] in (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130, Preempted.STATUS), codes
    assert len(codes) > 4 and {-signal.SIGKILL, Preempted.STATUS, 130} <= set(codes), codes
    assert _results(alone) and _results(stopped) == _results(alone)


@pytest.mark.slow
def test_the_pipeline_runs_from_prompts_to_rounds(tmp_path):
    """`make pipeline`, small: four commands, offline, with a judge that ranked nothing."""
    command = shlex.join([sys.executable, "-m", "trl_sipo.cli.main"])
    sizes = {"OUTPUT": str(tmp_path), "STEPS": "4", "ROUNDS": "2", "SAMPLES": "2", "TRL_SIPO": command}
    script = ["sh", str(ROOT / "examples" / "pipeline.sh")]
    done = subprocess.run(script, cwd=ROOT, env={**ENVIRONMENT, **sizes}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs = json.loads((tmp_path / "feedback" / "feedback.json").read_text())
    assert pairs["prompts"] == 48 and pairs["pairs"] > 10
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert {row["metric"] for row in evaluation["metrics"]} >= {"fashion", "fashion-second"}
    online = json.loads((tmp_path / "online" / "online.json").read_text())
    assert [part["round"] for part in online["rounds"]] == [0, 1] and online["config"]["rewards"] == ["fashion"]
    second = [row for row in online["rounds"][1]["evaluation"]["metrics"] if row["metric"] == "fashion-second"]
    assert len(second) == 2
