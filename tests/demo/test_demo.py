# SPDX-License-Identifier: Apache-2.0
"""The demo as a user runs it: a real process, real training, real files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from trl_sipo.demo.arm import DemoFiles
from trl_sipo.demo.demo import run_demo as run_in_process
from trl_sipo.demo.fashion import ASSETS
from trl_sipo.demo.images import IMAGES
from trl_sipo.demo.prepare import protocol_digest
from trl_sipo.demo.settings import FULL, QUICK
from trl_sipo.errors import ConfigurationError
from trl_sipo.scripts.demo import retrain

COMMAND = [sys.executable, "-m", "trl_sipo.cli.main", "demo", "--quick", "--workers", "2", "--max-steps", "6"]


def run_demo(output: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*COMMAND, "--output", str(output), *options], capture_output=True, text=True, env=environment, timeout=500
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo of six steps, run once."""
    output = tmp_path_factory.mktemp("demo")
    process = run_demo(output)
    assert process.returncode == 0, process.stderr[-3000:]
    return output, process


def test_the_summary_holds_every_measure_of_every_run(finished):
    output, _ = finished
    summary = json.loads((output / "summary.json").read_text())
    part = summary["parts"]["off_policy"]
    assert [(run["arm"], run["seed"]) for run in part["runs"]] == [("dpo", 0), ("sipo", 0)]
    for run in part["runs"]:
        assert [record["step"] for record in run["steps"]] == [0, 6]
        for record in run["steps"]:
            assert {"accuracy", "second_accuracy", "frechet_distance", "diversity", "masked_share"} <= set(record)
            assert {"held_out_accuracies", "held_out_chosen", "held_out_rejected"} <= set(record)
    # Before training every method is the base model, by the same prompts and noise.
    first = [run["steps"][0] for run in part["runs"]]
    assert first[0] == first[1]
    assert first[0]["accuracy"] == summary["base"]["accuracy"] > 0.7
    assert first[0]["held_out_accuracies"] == 0.5
    assert 0.85 < summary["ceiling"]["primary"]["reconstructed"]["both"] <= 1
    assert 300 < part["num_train_pairs"] <= 384 and part["num_held_out_pairs"] > 0


def test_training_moved_the_model(finished):
    output, _ = finished
    for run in json.loads((output / "summary.json").read_text())["parts"]["off_policy"]["runs"]:
        assert run["steps"][-1]["held_out_chosen"] != 0.0


def test_the_report_opens_from_disk_with_all_its_pictures(finished):
    output, process = finished
    page = (output / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in ("importance_weight", "rewards", "quality", "samples"):
        with Image.open(output / "figures" / f"off_policy_{name}.png") as figure:
            figure.load()
            assert min(figure.size) > 200
    assert "report.html" in process.stdout and "Diffusion-DPO" in process.stdout and "Ceiling" in process.stdout


def test_a_demo_that_is_there_already_is_not_trained_again(finished):
    output, _ = finished
    results = sorted(output.glob("runs/*/result.json"))
    times = [result.stat().st_mtime_ns for result in results]
    assert len(results) == 2
    again = run_demo(output)
    assert again.returncode == 0 and "2 runs were there already" in again.stdout
    assert [result.stat().st_mtime_ns for result in results] == times


def test_a_wrong_arm_is_named_before_anything_is_done(tmp_path):
    process = run_demo(tmp_path / "out", "--arms", "dpo", "ppo")
    assert process.returncode == 2
    assert "ppo" in process.stderr and "sipo" in process.stderr and "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="plots"):
        run_in_process(QUICK, DemoFiles(tmp_path / "out", ASSETS), IMAGES, workers=1, command="demo")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--max-steps", "2000", "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/output.txt")) and time.monotonic() < deadline:
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    # The workers' parent is gone, so it is init that reaps them, in its own time.
    deadline = time.monotonic() + 60
    while is_group_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not is_group_alive(process.pid)


def is_group_alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_another_base_model_is_another_protocol(tmp_path):
    shipped = DemoFiles(tmp_path, ASSETS)
    other = DemoFiles(tmp_path, base=tmp_path / "base")
    shutil.copytree(shipped.base_pipeline, other.base_pipeline)
    shutil.copytree(shipped.verifiers, other.verifiers)
    assert protocol_digest(QUICK, other) == protocol_digest(QUICK, shipped) == protocol_digest(FULL, shipped)
    assert protocol_digest(replace(QUICK, beta=3.0), shipped) != protocol_digest(QUICK, shipped)
    weights = next(other.base_pipeline.glob("unet/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x3c\x00\x3c")
    assert protocol_digest(QUICK, other) != protocol_digest(QUICK, shipped)


def test_a_base_that_was_retrained_is_not_trained_again(tmp_path):
    files = DemoFiles(tmp_path, base=tmp_path / "base")
    files.base.mkdir()
    files.training_log.write_text("{}")
    assert retrain(files.base, threads=1) == files.base
    assert list(files.base.iterdir()) == [files.training_log]
