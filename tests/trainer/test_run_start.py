# SPDX-License-Identifier: Apache-2.0
"""What is written down when a run starts: what is done with what, by which command, without names and secrets."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.run_logs import lines
from tests.trainer.runs import SIPO, make_trainer
from trl_sipo.trainer.description import num_trained_parameters
from trl_sipo.trainer.run_start import _without_secrets, command_words, describe_start

TOKEN = "hf_" + "abcdefghijklmnop"


def test_a_start_says_what_is_done_with_what_and_names_nobody(tmp_path, monkeypatch):
    command = ["/home/somebody/bin/trl-sipo", "sipo", "--hub_token", TOKEN, "--output_dir", "runs/a", "--lora_r", "4"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    options = {"hub_token": TOKEN, "run_name": f"with {TOKEN} and a-token-of-another-form", "clip_range": 0.2}
    make_trainer(SIPO, tmp_path, max_steps=1, importance_steps=40, **options).train()

    (start,) = lines(tmp_path, "starts")
    assert start["command"] == ["trl-sipo", "sipo", "--hub_token", "***", "--output_dir", "runs/a", "--lora_r", "4"]
    assert start["format"] == 1 and start["step"] == 0 and start["time"].endswith("+00:00")
    assert (start["method"], start["backbone"], start["prediction_type"]) == (
        "SIPO", "StableDiffusionPipeline", "epsilon",
    )  # fmt: skip
    assert start["description"].startswith("SIPO on StableDiffusionPipeline at 32 px")
    assert start["lora"]["r"] == 4 and start["lora"]["alpha"] == 10 and "to_q" in start["lora"]["targets"]
    assert start["trained_parameters"] == 2752 and (start["train_pairs"], start["eval_pairs"]) == (8, None)
    assert (start["mask_threshold"], start["clip_range"], start["importance_steps"]) == (0.8, 0.2, 40)
    assert start["num_train_timesteps"] == 1000 and start["model"] is None
    assert start["settings"]["clip_range"] == 0.2 and start["settings"]["run_name"] == "with *** and ***"
    environment = start["environment"]
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert environment["device"] == "cpu" and environment["processes"] == 1 and environment["processor"]

    written = (tmp_path / "run_log" / "starts.jsonl").read_text()
    assert TOKEN not in written and "a-token" not in written and "somebody" not in written
    assert socket.gethostname() not in json.dumps([environment, start["command"]])
    assert str(Path.home()) not in json.dumps({**start, "settings": None})


PROGRAMS = {
    "script": (["train.py", "--a", "b c"], None, ["python", "train.py", "--a", "b c"]),
    "script elsewhere": (["/home/me/train.py"], None, ["python", "train.py"]),
    "command": (["/home/me/.venv/bin/trl-sipo", "dpo"], None, ["trl-sipo", "dpo"]),
    "module": (["/x/trl_sipo/scripts/train.py", "sipo"], "trl_sipo.scripts.train",
               ["python", "-m", "trl_sipo.scripts.train", "sipo"]),
    "package": (["/x/pytest/__main__.py"], "pytest.__main__", ["python", "-m", "pytest"]),
    "notebook": (["/x/ipykernel_launcher.py", "-f", "/home/me/kernel.json"], "ipykernel_launcher", []),
    "notebook elsewhere": (["/usr/lib/colab_kernel_launcher.py", "-f", "/root/k.json"], "colab_kernel_launcher", []),
    "typed": ([""], None, []),
    "text": (["-c", "of a text"], None, []),
    "embedded": ([], None, []),
    "secret": (["t.py", f"--wandb_api_key={TOKEN}"], None, ["python", "t.py", "--wandb_api_key=***"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_command_as_it_was_typed(name, monkeypatch):
    argv, module, words = PROGRAMS[name]
    spec = None if module is None else type(os.__spec__)(module, None)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
    assert command_words() == words


def test_no_command_where_no_program_says_one(monkeypatch):
    monkeypatch.delattr(sys, "argv")
    assert command_words() == []


def test_secrets_are_left_out_however_deep():
    settings = {
        "hub_token": "a",
        "by_name": {"token": "b", "deeper": [{"api_key": "c", "url": "http://u:d@host"}], "kept": 1},
    }
    cleaned = {"by_name": {"deeper": [{"url": "http://***@host"}], "kept": 1}}
    assert _without_secrets(settings) == cleaned


def test_nothing_is_clipped_where_nothing_is_weighted(tmp_path):
    start = describe_start(make_trainer(SIPO, tmp_path, reweight=False, mask=False))
    assert (start["mask_threshold"], start["clip_range"]) == (None, None)


def test_weights_that_are_spread_over_processes_are_counted_whole():
    """As DeepSpeed ZeRO-3 leaves them, where this package cannot run it: empty, with their size beside them."""
    model = torch.nn.Linear(3, 2)
    model.weight.ds_numel, model.weight.data = 6, torch.empty(0)
    assert num_trained_parameters(model) == 8
