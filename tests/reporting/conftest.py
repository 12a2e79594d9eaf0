# SPDX-License-Identifier: Apache-2.0
"""Real tiny runs, trained once, and the page of a report on them."""

import os

import pytest
import torch

from tests.trainer.runs import DPO, SIPO, make_trainer, preference_pairs
from trl_sipo.cli.main import main

HOSTILE_PROMPT = "</script><script>document.title='broken'</script>\u2028<img src=x onerror=alert(1)> & a \"boat\""
STEPS = 8


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Output folders of a run of SIPO, of Diffusion-DPO, each with evaluations and samples."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    options = {
        "max_steps": STEPS,
        "learning_rate": 3e-2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_on_start": True,
        "sample_every_steps": 4,
        "sample_num_inference_steps": 1,
        "sample_prompts": ["a red cat", HOSTILE_PROMPT],
        "sample_rewards": ["brightness"],
    }
    for method in (SIPO, DPO):
        held_out = {"trainer_options": {"eval_dataset": preference_pairs(4, seed=1)}}
        make_trainer(method, root / method.name, **held_out, **options).train()
    torch.set_num_threads(threads)
    return [root / SIPO.name, root / DPO.name]


@pytest.fixture(scope="session")
def page(runs, tmp_path_factory):
    """The report of both runs, written by the command."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    return output
